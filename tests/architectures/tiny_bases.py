"""Tiny random bases of every family that transformers' mappings name. No network, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.architectures.base_facts import base_facts
from tests.architectures.families import (
    CAUSAL,
    IMAGE_TEXT,
    NOT_TINY,
    causal_families,
    families,
    image_text_families,
    why_not_tiny,
)
from tests.architectures.tiny_configs import tiny_config
from tests.architectures.tiny_inputs import NEEDS_IMAGE, NO_IMAGE_INPUTS, tiny_inputs

AUTO_CLASSES = {CAUSAL: AutoModelForCausalLM, IMAGE_TEXT: AutoModelForImageTextToText}
CLOSED_AT_FIRST = ("attn_gate", "mlp_gate", "alpha_cross_attn", "alpha_dense")  # images would not matter
# Kept as the family draws them, but for convolutions over an image
KEEP_WEIGHTS = ("norm", "A_log", "conv", "rotary", "pos_emb", "position")


def tiny_base(model_type: str, task: str = CAUSAL, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random base of a few layers, in eval mode, with weights large enough that layers matter."""
    torch.manual_seed(seed)
    base = AUTO_CLASSES[task].from_config(tiny_config(model_type, task), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if any(word in name for word in CLOSED_AT_FIRST):
                parameter.fill_(0.5)
            elif parameter.ndim == 4 or parameter.ndim > 1 and not any(word in name for word in KEEP_WEIGHTS):
                parameter.normal_(std=0.15)
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    base.generation_config.forced_eos_token_id = None
    return base


__all__ = [
    "CAUSAL",
    "IMAGE_TEXT",
    "NEEDS_IMAGE",
    "NOT_TINY",
    "NO_IMAGE_INPUTS",
    "base_facts",
    "causal_families",
    "families",
    "image_text_families",
    "tiny_base",
    "tiny_config",
    "tiny_inputs",
    "why_not_tiny",
]
