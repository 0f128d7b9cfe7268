"""Valid inputs for a tiny base: words, and for a family that reads images one image a row with its placeholders.

Families differ in how an image is laid out. The layouts are tried in order, and the first one that the base's own
image encoder accepts is taken; what the encoder returns tells how many placeholders the row needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.architectures.small_values import IMAGE, PATCH

SIDE = IMAGE // PATCH  # patches
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
NEEDS_IMAGE = ("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5")


def tiny_inputs(
    base: Any, rows: int = 2, length: int = 9, seed: int = 3, with_image: bool | None = None
) -> dict[str, Tensor]:
    """Inputs for `base`, all words random and none of them special.

    Args:
        base: a base of `tiny_base`.
        rows: texts in the batch.
        length: words a text; placeholders of an image come on top.
        seed: for words and pixels.
        with_image: None puts an image where the family cannot do without. Not for those in `NO_IMAGE_INPUTS`.

    Returns:
        input_ids and attention_mask, (rows, length + placeholders), and what the image needs.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    if with_image is None:
        with_image = base.config.model_type in NEEDS_IMAGE
    if not with_image:
        if base.config.model_type in NEEDS_IMAGE:
            raise ValueError(f"Expected an image: {base.config.model_type} reads none but texts about images.")
        return _with_mask(base, ids, {})
    if base.config.model_type in WITHOUT_PLACEHOLDERS:
        return _with_mask(base, ids, WITHOUT_PLACEHOLDERS[base.config.model_type](base, rows, generator))
    failures = []
    for image in _layouts(base, rows, generator):
        try:
            count = _placeholders(base, image, rows)
        except Exception as failure:  # any: the encoders differ in how they refuse a layout
            failures.append(f"{ {name: tuple(value.shape) for name, value in image.items()} }: {failure}")
            continue
        return _with_mask(base, _insert(base, ids, count), image)
    raise ValueError("Expected an image that the base accepts. Tried:\n" + "\n".join(failures))


NO_IMAGE_INPUTS = {
    "emu3": "its smallest image encoder wants larger images",
    "granite4_vision": "its images are fed to several layers, and how many placeholders they need is not told",
    "inkling2_loop": "the layout of its patches is not found out",
    "inkling2": "the layout of its patches is not found out",
    "inkling_mm_model": "the layout of its patches is not found out",
    "mistral4": "a text model, in spite of the mapping's name",
}

if transformers.__version__ == "5.12.0":
    NO_IMAGE_INPUTS["fuyu"] = "its generate takes patches under another name"


def parameters_of(function: Any) -> set[str]:
    """The names of the function's parameters."""
    return set(inspect.signature(function).parameters)


def image_token(base: Any) -> int:
    """The id of the word that stands for a piece of an image."""
    for name in IMAGE_TOKENS:
        value = getattr(base.config, name, None)
        if isinstance(value, int):
            return value
    return 98  # the family marks the places by a mask


def _with_mask(base: Any, ids: Tensor, image: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
    if "image_attention_mask" in inputs:
        inputs["image_attention_mask"] = inputs["image_attention_mask"].expand(-1, ids.shape[1], -1)
    if "aspect_ratio_mask" in inputs:  # without it, Mllama's cached and uncached tokens differ
        tiles = inputs["aspect_ratio_mask"]
        inputs["cross_attention_mask"] = tiles[:, None].expand(-1, ids.shape[1], -1, -1).contiguous()
    accepted = parameters_of(base.forward)
    if image:
        is_image = (ids == image_token(base)).long() if base.config.model_type not in WITHOUT_PLACEHOLDERS else 0 * ids
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in accepted:
                inputs[name] = is_image
        if "moe_mm_token_type_ids" in accepted:
            inputs["moe_mm_token_type_ids"] = is_image
        if "image_embeds_position_mask" in accepted:
            inputs["image_embeds_position_mask"] = is_image
    return inputs


def _insert(base: Any, ids: Tensor, count: int) -> Tensor:
    """`count` placeholders after the first word, between the marks of an image if the family has such."""
    config = base.config
    marks = []
    for place in ("start", "end"):
        names = (f"vision_{place}_token_id", f"image_{place}_token_id")
        marks.append([getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)][:1])
    row = torch.tensor([*marks[0], *[image_token(base)] * count, *marks[1]])
    return torch.cat([ids[:, :1], row.expand(len(ids), -1), ids[:, 1:]], dim=1)


def _placeholders(base: Any, image: dict[str, Tensor], rows: int) -> int:
    """Placeholders a row needs: as many as the encoder returns vectors of the text's width."""
    model_type = base.config.model_type
    if model_type in PLACEHOLDERS:
        return PLACEHOLDERS[model_type]
    owner = base if hasattr(base, "get_image_features") else base.model
    accepted = parameters_of(owner.get_image_features)
    named = image if accepted <= {"args", "kwargs"} else {n: v for n, v in image.items() if n in accepted | KEYWORDS}
    with torch.no_grad():
        found = owner.get_image_features(**named)
    pooled = getattr(found, "pooler_output", found)
    found = found.last_hidden_state if pooled is None else pooled
    count = sum(part.numel() for part in found) if isinstance(found, (list, tuple)) else found.numel()
    width = base.config.get_text_config().hidden_size
    if count % (width * rows):
        raise ValueError(f"Expected whole vectors of the text's width. Received: {count} numbers")
    return count // (width * rows)


def _layouts(base: Any, rows: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Images of `IMAGE` pixels a side, one a row, in the ways that families lay them out."""
    accepted = parameters_of(base.forward)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    square = torch.tensor([[IMAGE, IMAGE]] * rows)
    patches = SIDE * SIDE
    if "image_grid_thw" in accepted or "image_grid_hw" in accepted:
        grid = {"image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * rows)}
        if "image_grid_hw" in accepted:
            grid = {"image_grid_hw": torch.tensor([[SIDE, SIDE]] * rows)}
        if "image_merge_sizes" in accepted:
            grid["image_merge_sizes"] = torch.ones(rows, dtype=torch.long)
        for frames in (2, 1):
            yield {"pixel_values": noise(rows * patches, 3 * frames * PATCH * PATCH), **grid}
            yield {"pixel_values": noise(rows * patches, frames, 3, PATCH, PATCH), **grid}
        yield {"pixel_values": noise(rows * patches, 3, PATCH, PATCH), **grid}
        yield {"pixel_values": noise(rows, patches, 3, PATCH, PATCH), **grid}
    if "image_position_ids" in accepted:
        places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).flip(-1).expand(rows, -1, -1)
        for factor in (1, 2, 3):
            yield {"pixel_values": torch.rand(rows, patches, 3 * (PATCH * factor) ** 2), "image_position_ids": places}
    if "spatial_shapes" in accepted:
        yield {
            "pixel_values": noise(rows, patches, 3 * PATCH * PATCH),
            "spatial_shapes": torch.tensor([[SIDE, SIDE]] * rows),
            "pixel_attention_mask": torch.ones(rows, patches, dtype=torch.long),
        }
    if "target_sizes" in accepted:
        sizes = {"target_sizes": torch.tensor([[SIDE, SIDE]] * rows, dtype=torch.int32)}
        yield {"pixel_values": noise(1, 3, PATCH, rows * patches * PATCH), **sizes}
    if "flattened_patches" in accepted:  # row and column in front of the pixels
        places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)) + 1.0
        yield {"flattened_patches": torch.cat([places.expand(rows, -1, -1), noise(rows, patches, 48)], dim=-1)}
    if "qformer_input_ids" in accepted:
        question = {"qformer_input_ids": torch.full((rows, 3), 5)}
        video = "video" in base.config.model_type
        yield {"pixel_values": noise(rows, *([1] if video else []), 3, IMAGE, IMAGE), **question}
    if "tile_fine_mask" in accepted:
        tiles = torch.ones(rows, 1, dtype=torch.bool)
        yield {"pixel_values": noise(rows, 1, 3, IMAGE, IMAGE), "pixel_attention_mask": tiles}
    if "pixel_attention_mask" in accepted:
        yield {
            "pixel_values": noise(rows, 1, 3, IMAGE, IMAGE),
            "pixel_attention_mask": torch.ones(rows, 1, IMAGE, IMAGE, dtype=torch.long),
        }
        yield {"pixel_values": noise(rows, 1, 3, IMAGE, IMAGE)}
    if "image_token_pooling" in accepted:
        yield {
            "pixel_values": noise(rows, patches, 3 * PATCH * PATCH),
            "image_token_pooling": torch.arange(patches * rows).view(rows * 4, 4) % (patches * rows),
            "image_grids": torch.tensor([[0, 0, 2, 2]] * rows),
            "image_num_crops": torch.ones(rows, dtype=torch.long),
        }
    if "high_res_pixel_values" in accepted:
        yield {"pixel_values": noise(rows, 3, IMAGE, IMAGE), "high_res_pixel_values": noise(rows, 3, IMAGE, IMAGE)}
    if {"image_sizes", "vision_feature_select_strategy"} <= accepted and "batch_num_images" not in accepted:
        yield {"pixel_values": noise(rows, 3, IMAGE, IMAGE)}
    if "image_sizes" in accepted:
        yield {"pixel_values": noise(rows, 3, 3, IMAGE, IMAGE), "image_sizes": torch.tensor([[16, 32]] * rows)}
        yield {"pixel_values": noise(rows, 3, IMAGE, IMAGE), "image_sizes": square}
    yield {"pixel_values": noise(rows, 3, IMAGE, IMAGE)}
    yield {"pixel_values_images": noise(rows, 3, IMAGE, IMAGE)}
    yield {"pixel_values": noise(rows * patches, 2, 3, PATCH, PATCH)}
    yield {"pixel_values": noise(rows, patches, 3 * PATCH * PATCH)}


def _whole_image(base: Any, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)}


def _tiled(base: Any, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(rows, 1, 4, 3, IMAGE, IMAGE, generator=generator),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([1, 0, 0, 0]).expand(rows, 1, 4),
    }


def _image_a_row(base: Any, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(rows, 1, 3, IMAGE, IMAGE, generator=generator),
        "image_attention_mask": torch.ones(rows, 1, 1, dtype=torch.long),  # stretched to the text's length
    }


WITHOUT_PLACEHOLDERS = {"blip": _whole_image, "git": _whole_image, "idefics": _image_a_row, "mllama": _tiled}
PLACEHOLDERS = {"deepseek_vl": 16, "deepseek_vl_hybrid": 16, "janus": 16, "llama4": 4, **dict.fromkeys(NEEDS_IMAGE, 4)}
KEYWORDS = {"image_merge_sizes"}  # what an image encoder takes without naming it

__all__ = ["NEEDS_IMAGE", "NO_IMAGE_INPUTS", "image_token", "parameters_of", "tiny_inputs"]
