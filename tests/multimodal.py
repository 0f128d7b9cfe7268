"""A tiny Gemma 3 that reads images, its processor, and pictures."""

from __future__ import annotations

from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast

from tests.tiny import prompt

IMAGE, BEGIN, END = 290, 291, 292
WORDS = {
    "<pad>": 0,
    "<bos>": 1,
    "<eos>": 2,
    "<image_soft_token>": IMAGE,
    "<start_of_image>": BEGIN,
    "<end_of_image>": END,
}


def multimodal() -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny Gemma 3 as its 4B and larger releases are, whose vision tower has as many layers, and an input."""
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    parts: dict[str, Any] = {"text_config": {**text, **heads}, "vision_config": {**vision, **sizes}}
    parts |= {"mm_tokens_per_image": 4, "image_token_id": IMAGE}
    config = Gemma3Config(**parts)
    base = Gemma3ForConditionalGeneration(config).eval()
    # New, it is zero, and every image the same.
    torch.nn.init.normal_(base.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    base.generation_config.eos_token_id = None
    ids = prompt(2, 12)
    ids[:, 2:6] = IMAGE
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return base, {"input_ids": ids, "pixel_values": images, "token_type_ids": (ids == IMAGE).long()}


def processor() -> Any:
    words = {f"w{i}": i for i in range(300) if i not in WORDS.values()} | WORDS
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokens: Any = {
        "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>",
        "extra_special_tokens": {
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **tokens)
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return Gemma3Processor(images, tokenizer, image_seq_length=4)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=numpy.uint8))
