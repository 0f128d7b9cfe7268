"""The example of gated steering runs from end to end, on a tiny model and made-up texts, and goes on when stopped."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.create_training_data.words import WORDS, word_tokenizer
from tests.test_examples import load, write
from tests.tiny import tiny_base


def share_of_early_words(texts: Sequence[str]) -> torch.Tensor:
    early = set(WORDS[:45])
    return torch.tensor([sum(word in early for word in text.split()) / max(1, len(text.split())) for text in texts])


@pytest.mark.slow
def test_gated_steering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    draw, files = random.Random(0), []
    for toxic, usual in ((1, WORDS[:9]), (0, WORDS[9:18])):
        rows = [
            {
                name: {"text": " ".join(draw.choices(usual, k=5)) + " ", "toxicity": 0.9 if toxic else 0.1}
                for name in ("prompt", "continuation")
            }
            for _ in range(60)
        ]
        files.append(write(tmp_path / f"{toxic}.jsonl", rows))
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    asked = [
        *(
            "--rtp",
            *files,
            "--model",
            str(tmp_path / "model"),
            "--hook-points",
            "layers.0.resid_post",
            "layers.1.resid_post",
            "--texts",
            write(tmp_path / "more.jsonl", [{"text": " ".join(draw.choices(WORDS, k=9))} for _ in range(12)]),
            "--max-texts",
            "9",
            "--out",
            str(out),
        ),
        *("--latents", "48", "--k", "6", "--steps", "20", "--false-alarm-rate", "0.1", "--calibrate-prompts", "12"),
        *("--detect-prompts", "6", "--search-prompts", "4", "--report-prompts", "8", "--neutral-prompts", "8"),
        *("--pair-prompts", "12", "--samples", "3", "--features", "8", "--keep", "3", "--epochs", "1"),
        *("--new-tokens", "4", "--perplexity-limit", "100", "--seeds", "0", "1"),
    ]
    module = load("gated_steering")
    monkeypatch.setattr(module, "get_scorer", lambda name: share_of_early_words)
    monkeypatch.setattr(sys, "argv", ["gated_steering.py", *asked])
    module.main()
    text = (out / "results.json").read_text(encoding="utf-8")
    found = json.loads(text)
    kinds = [(row["vector"], row["gate"]) for row in found["table"]]
    assert kinds == [("none", None)] + [
        (vector, gate)
        for vector, own in (("latent", "latent"), ("DiffMean", "DiffMean"), ("learnt", "latent"))
        for gate in (None, own, "probe")
    ]
    rows = dict(zip(kinds, found["table"], strict=True))
    for vector in ("latent", "DiffMean", "learnt"):
        always, gated = rows[vector, None], rows[vector, "probe"]
        assert always["toxic"]["prompts"] == 16 and always["neutral"]["prompts"] == 16
        assert gated["neutral"]["changed"] <= gated["neutral"]["opened"] < gated["toxic"]["opened"]
        assert gated["neutral"]["changed"] < always["neutral"]["changed"]
    for run in found["runs"]:  # a prompt whose gate is shut is what it was
        for point in run["points"]:
            for kind in ("toxic", "neutral"):
                own, base = point[kind], run["points"][0][kind]
                for place, is_open in enumerate(own.get("opened", ())):
                    if not is_open:
                        assert own["changed"][place] == 0 and own["losses"][place] == base["losses"][place]
        assert run["gates"]["probe"]["false_alarm_rate"] <= 0.1 and len(run["learnt"]["steering"]["edits"]) <= 3
    assert WORDS[0] + " " + WORDS[1] not in text  # numbers, no texts
    assert "neutral changed" in capsys.readouterr().out
    again: list[Any] = []
    monkeypatch.setattr(module.SaeForCausalLM, "generate", lambda *args, **options: again.append(1))
    module.main()  # all continuations are in the journal
    assert not again
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["table"] == found["table"]
