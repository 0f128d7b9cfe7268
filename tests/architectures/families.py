"""Which families there are in the installed transformers, and which of them cannot be had small on this machine."""

from __future__ import annotations

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)

CAUSAL, IMAGE_TEXT = "causal-lm", "image-text-to-text"
NAMES = {CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", IMAGE_TEXT: "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"}

_TIMM = "its image encoder needs the package timm"
_ENCODER_DECODER = "encoder-decoder: the text given is the encoder's, and only the answer is decoded"
_DRAFTER = "a drafter: reads the cache and the hidden states of the model that it drafts for"
_AUDIO_CODES = "decodes audio codes, several codebooks at a time, after a text encoder of another kind"

# Reason by model type; it holds for every task that lists the name. The encoder-decoders could be built: they are
# left out because they are no decoders.
NOT_TINY: dict[str, str] = {
    "diffusion_gemma": "fills a canvas by denoising: no next token",
    "evolla": "reads proteins, and its Auto class does not take its configuration",
    "fast_vlm": _TIMM,
    "florence2": _ENCODER_DECODER,
    "gemma3n": _TIMM,
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "musicgen": _AUDIO_CODES,
    "musicgen_melody": _AUDIO_CODES,
    "perception_lm": _TIMM,
    "pi0": "predicts a robot's actions: no generate",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
}

# What a single release cannot do, by its number, task and model type.
_RELEASES: dict[tuple[str, str, str], str] = {
    ("5.12.0", CAUSAL, "cpmant"): "generate with the cache fails: its mask leaves out the prompt tokens",
    ("5.24.0", IMAGE_TEXT, "llama4"): "its forward reads a field `image_outputs` that the output does not have",
}


def why_not_tiny(model_type: str, task: str) -> str:
    """The reason why the family cannot be had small with the installed transformers, or "" if it can."""
    return NOT_TINY.get(model_type) or _RELEASES.get((transformers.__version__, task, model_type), "")


def causal_families() -> list[str]:
    """Model types that `AutoModelForCausalLM` of the installed transformers knows, in alphabetical order."""
    return families(CAUSAL)


def image_text_families() -> list[str]:
    """Model types that `AutoModelForImageTextToText` of the installed transformers knows, in alphabetical order."""
    return families(IMAGE_TEXT)


def families(task: str) -> list[str]:
    """Model types of one task; of names that share class and configuration, the configuration's own alone."""
    found: dict[tuple[str, str], list[str]] = {}
    for model_type, name in getattr(modeling_auto, NAMES[task]).items():
        found.setdefault((str(name), CONFIG_MAPPING_NAMES[model_type]), []).append(model_type)
    return sorted(
        min(names, key=lambda name: (CONFIG_MAPPING[name].model_type != name, name)) for names in found.values()
    )


__all__ = ["CAUSAL", "IMAGE_TEXT", "NOT_TINY", "causal_families", "families", "image_text_families", "why_not_tiny"]
