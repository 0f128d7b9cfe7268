"""Samples of single features: in their order, and with the same random numbers."""

from __future__ import annotations

from typing import Any

import torch

from sae_transformers import SaeForCausalLM
from sae_transformers.evaluation.settings import GenerationSettings
from sae_transformers.evaluation.steering.samples import steering_samples
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae


def test_samples_share_their_random_numbers() -> None:
    base, sae = tiny_base(vocab_size=94), tiny_sae(layer=1, k=4)
    model: Any = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    rows = steering_samples(
        model,
        word_tokenizer(),
        ["w1 w2", "w3"],
        [5, 6],
        [1e-9, 3.0],
        GenerationSettings(5, 1.0, seed=2, batch_size=3),
    )
    assert [(row["feature"], row["strength"], row["prompt"]) for row in rows] == [
        (None, 0.0, "w1 w2"), (None, 0.0, "w3"),
        *((f, v, p) for f in (5, 6) for v in (1e-9, 3.0) for p in ("w1 w2", "w3")),
    ]  # fmt: skip
    by = {(row["feature"], row["strength"], row["prompt"]): row for row in rows}
    for prompt in ("w1 w2", "w3"):
        assert by[5, 1e-9, prompt]["text"] == by[None, 0.0, prompt]["text"] != by[5, 3.0, prompt]["text"]
        assert torch.isfinite(torch.tensor([row["perplexity"] for row in rows])).all()
