"""The example of the steering suite runs from end to end, on a tiny model and made-up texts."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from sae_transformers.evaluation.results import read_results
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.test_examples import load, write
from tests.tiny import tiny_base, tiny_sae


def test_steering_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    files = []
    for toxic, usual in ((1, WORDS[:9]), (0, WORDS[9:18])):
        score = 0.9 if toxic else 0.1
        rows = [
            {
                name: {"text": " ".join(draw.choices(usual, k=5)) + " ", "toxicity": score}
                for name in ("prompt", "continuation")
            }
            for _ in range(12)
        ]
        files.append(write(tmp_path / f"{toxic}.jsonl", rows))
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    tiny_sae(layer=1, site="resid_post").save_pretrained(tmp_path / "sae")
    asked = [
        *("--rtp", *files, "--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--labelled", "8"),
        *("--prompts", "4", "--new-tokens", "3", "--strengths", "-0.3", "0.3", "--scorer", "words"),
        *("--resamples", "50", "--selection", "input", "--out", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", ["steering_suite.py", *asked])
    load("steering_suite").main()
    text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    found = read_results(tmp_path / "out" / "results.json").suites["steering"]
    methods = list(dict.fromkeys(row["method"] for row in found.curves["reporting"]))
    assert methods[0] == "none" and methods[1].startswith("latent ") and methods[2:] == ["diffmean", "prompt"]
    assert found.value("kl_prompt_nats", "none") == 0 and found.settings["asked"]["latent"]["auroc"] > 0.9
    assert [one.name for one in found.data] == ["1.jsonl", "0.jsonl"]
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    assert WORDS[0] + " " + WORDS[1] not in text and "insulting" in text  # numbers and instructions, no texts
