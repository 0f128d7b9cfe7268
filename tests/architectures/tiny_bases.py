"""Tiny random bases of every family that transformers' mappings name. No network, no files."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.architectures.tiny_configs import tiny_config

AUTO_CLASSES = {"causal-lm": AutoModelForCausalLM, "image-text-to-text": AutoModelForImageTextToText}
NAMES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
KEEP_WEIGHTS = ("norm", "A_log", "conv", "rotary", "pos_emb", "position")


def causal_families() -> list[str]:
    """Model types of the installed transformers that `AutoModelForCausalLM` knows, in alphabetical order."""
    return _families("causal-lm")


def image_text_families() -> list[str]:
    """Model types of the installed transformers that `AutoModelForImageTextToText` knows, in alphabetical order."""
    return _families("image-text-to-text")


def _families(task: str) -> list[str]:
    return sorted(getattr(modeling_auto, NAMES[task]))


def tiny_base(
    model_type: str, task: str = "causal-lm", seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random base of a few layers, in eval mode, with weights large enough that layers matter."""
    torch.manual_seed(seed)
    base = AUTO_CLASSES[task].from_config(tiny_config(model_type, task), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1 and not any(word in name for word in KEEP_WEIGHTS):
                parameter.normal_(std=0.15)
    base.generation_config.eos_token_id = None
    return base


__all__ = ["causal_families", "image_text_families", "tiny_base", "tiny_config"]
