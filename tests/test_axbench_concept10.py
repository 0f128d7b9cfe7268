"""The AxBench example runs from end to end, on a tiny model and made-up concepts."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest

from sae_transformers.create_training_data.concept_sets import (
    HARD,
    NEGATIVE,
    POSITIVE,
    ConceptSet,
    Example,
    write_concept_sets,
)
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.test_examples import load, numbers
from tests.tiny import tiny_base, tiny_sae


def test_axbench_concept10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def made(usual: list[str], n: int) -> list[Example]:
        return [
            Example(
                " ".join(draw.choices(WORDS[60:], k=4)),
                " ".join([*draw.choices(usual, k=5), *draw.choices(WORDS[20:], k=3)]),
            )
            for _ in range(n)
        ]

    plain = made(WORDS[10:15], 16)
    sets = [
        ConceptSet(
            f"concept {i}",
            {POSITIVE: made(usual, 14), NEGATIVE: plain},
            {POSITIVE: made(usual, 8), NEGATIVE: made(WORDS[10:15], 8), HARD: made(WORDS[14:18], 2)},
        )
        for i, usual in enumerate((WORDS[:5], WORDS[5:10]))
    ]
    write_concept_sets(sets, tmp_path / "data")
    tiny_base(vocab_size=len(word_tokenizer())).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    tiny_sae(layer=1, site="resid_post").save_pretrained(tmp_path / "sae")
    asked = [
        *("--data", str(tmp_path / "data"), "--sae", str(tmp_path / "sae"), "--model", str(tmp_path / "model")),
        *("--instructions", "4", "--new-tokens", "5", "--strengths", "0.5", "2", "--searched", "2", "--pool", "6"),
        *("--outcome-answers", "12", "--effect-latents", "4"),
        *("--out", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(sys, "argv", ["axbench_concept10.py", *asked])
    module = load("axbench_concept10")
    module.main()
    file = tmp_path / "out" / "results.json"
    text = file.read_text(encoding="utf-8")
    found = json.loads(text)
    assert all(map(math.isfinite, numbers(found["detection"]))) and found["counts"][0]["train"] == 30
    aurocs = found["detection"]["auroc"]
    assert all(len(values) == 2 for values in aurocs.values())
    assert min(aurocs["bag of words"]) > 0.8 and min(aurocs["linear probe"] + aurocs["DiffMean"]) > 0.6
    for name in ("latent chosen by auroc", "latents not chosen (mean over live ones)"):
        assert max(aurocs[name]) <= max(aurocs["best latent on the evaluation answers themselves"])
    methods = found["steering"]["methods"]
    assert set(methods) == set(module.METHODS.values()) and all(len(rows) == 2 for rows in methods.values())
    assert list(methods["DiffMean"][1]["curve"]) == ["direction 1 0.5", "direction 1 2"]
    assert len(methods[module.METHODS["tried"]][0]["curve"]) == 4
    assert all(0 <= row["overall"] <= 2 for rows in methods.values() for row in rows)
    assert min(found["steering"]["judge_auroc"]) > 0.8
    effects = found["steering"]["effects"]
    assert [len(rows) for rows in effects] == [4, 4] and all(map(math.isfinite, numbers(effects)))
    assert set(module.rank_correlations(effects)) == {*effects[0][0]} - {"feature", "concept_effect", "overall_effect"}
    assert WORDS[0] + " " not in text  # numbers, no texts
    again = [*asked, "--no-steering"]
    monkeypatch.setattr(sys, "argv", ["axbench_concept10.py", *again])
    monkeypatch.setattr(module.Reading, "read", None)  # what was read is kept
    module.main()
    assert json.loads(file.read_text(encoding="utf-8"))["detection"] == found["detection"]
