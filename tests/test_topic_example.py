"""The example of topic alignment runs from end to end, on a tiny model and made-up texts."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest

from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.test_examples import load, numbers
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


def test_topic_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def some(count: int, words: list[str]) -> list[str]:
        return [" ".join(draw.choices(words, k=12)) for _ in range(count)]

    for name, count in (("reference", 24), ("medical", 6)):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text", *some(count, WORDS)]) + "\n", encoding="utf-8")
    rows = [{"QUESTION": q, "LONG_ANSWER": a} for q, a in zip(some(70, WORDS), some(70, WORDS[:9]), strict=True)]
    (tmp_path / "pubmedqa.json").write_text(json.dumps(dict(enumerate(rows))), encoding="utf-8")
    (tmp_path / "plays.txt").write_text(" ".join(draw.choices(WORDS, k=20_000)), encoding="utf-8")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    tiny_sae(layer=1, site="resid_post").save_pretrained(tmp_path / "sae")
    asked = [
        *("--reference", str(tmp_path / "reference.csv"), "--medical", str(tmp_path / "medical.csv")),
        *("--pubmedqa", str(tmp_path / "pubmedqa.json"), "--shakespeare", str(tmp_path / "plays.txt")),
        *("--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")),
        *("--embedder", save_tiny_embedder(tmp_path), "--prompts", "2", "--new-tokens", "3", "--max-length", "16"),
        *("--topics", "medical", "pubmedqa", "shakespeare", "random", "--lora-epochs", "1"),
    ]
    monkeypatch.setattr(sys, "argv", ["topic_alignment.py", *asked])
    load("topic_alignment").main()
    text = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert list(found) == ["medical", "pubmedqa", "shakespeare", "random"]
    assert "LoRA" in found["medical"]["methods"] and "LoRA" not in found["pubmedqa"]["methods"]
    for report in found.values():
        assert all(map(math.isfinite, numbers(report["uncertainty"])))
        assert set(report["methods"]) >= {"orig", "swap", "swap:4", "prompting"}
        assert report["texts"]["topic"] in (6, 20) and 0 < report["uncertainty"]["uncertainty"] <= 1
    assert WORDS[0] + " " not in text  # numbers, no texts
