"""The model that benchmarks run where none is given."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def load_base(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of that name; `random-135m` has SmolLM2-135M's shape and random weights, and needs no download."""
    if name != "random-135m":
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
