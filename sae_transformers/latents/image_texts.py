"""Texts with images in them: read by the base's processor, one row a sequence, in batches that it pads itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


class ImageTexts:
    """Rows as a processor reads them. Texts without a mark for an image get their images in front.

    Args:
        processor: of the base (`AutoProcessor`); called with texts and images, it gives the model's inputs.
        texts: of the rows.
        images: of each row, as `opened_images` gives them.
        first_row: number of the first row in its source.
        max_length: tokens that a row may have: an image cannot be cut.

    Raises:
        ValueError: a row has more tokens.
    """

    def __init__(
        self,
        processor: Callable[..., Mapping[str, Tensor]],
        texts: Sequence[str],
        images: Sequence[Sequence[Any]],
        *,
        first_row: int = 0,
        max_length: int | None = None,
    ) -> None:
        mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", "")
        self.processor = processor
        read = [n for n, (text, pictures) in enumerate(zip(texts, images, strict=True)) if text.strip() or pictures]
        self.rows = [first_row + n for n in read]
        self.images = [list(images[n]) for n in read]
        self.texts = [
            text if mark in text else mark * len(pictures) + text
            for text, pictures in zip((texts[n] for n in read), self.images, strict=True)
        ]
        self.ids = [self.inputs([n])["input_ids"][0] for n in range(len(read))]
        for row, ids in zip(self.rows, self.ids, strict=True):
            if max_length is not None and len(ids) > max_length:
                raise ValueError(
                    f"A row with an image is a sequence and is not cut: `max_length` must be {len(ids)} or more. "
                    f"Received: max_length={max_length!r}, {len(ids)} tokens in row {row}."
                )

    @property
    def kinds(self) -> list[int]:
        """Number of images of each row: only rows with equally many go into one batch."""
        return [len(pictures) for pictures in self.images]

    def inputs(self, members: Sequence[int]) -> dict[str, Tensor]:
        """What the base is called with for these rows, padded on the right."""
        pictures = [self.images[n] for n in members]
        found = self.processor(
            text=[self.texts[n] for n in members],
            images=pictures if pictures[0] else None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return dict(found)


def opened_images(value: Any, number: int) -> list[Any]:
    """The images of a row's column: none, one, or a list; each a picture, its bytes or a local file.

    Raises:
        ValueError: something else, such as an address: images are not fetched.
        ImportError: Pillow, which opens files, is not installed.
    """
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [_opened(one, number) for one in values]


def _opened(value: Any, number: int) -> Any:
    if hasattr(value, "convert"):
        return value.convert("RGB")
    content = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        source: Any = io.BytesIO(content)
    elif isinstance(content, str) and Path(content).is_file():
        source = content
    else:
        raise ValueError(
            f"Expected a picture, its bytes or a file that exists. Received: {str(content)[:80]!r} in row {number}."
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Reading images needs Pillow, which is not installed: pip install pillow") from error
    try:
        with Image.open(source) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ValueError(f"The image of row {number} cannot be read: {error}") from error


def image_token_ids(config: PretrainedConfig) -> list[int]:
    """The ids that stand for an image's patches in a base's input; none for a base that reads texts alone."""
    found = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
    return [value for value in found if isinstance(value, int)]


def image_choice(ids: Tensor, tokens: Sequence[int], choice: str) -> Tensor:
    """(length,) bool: the positions that `keep`, `drop` or `only` images leave."""
    images = torch.isin(ids, torch.tensor(list(tokens), dtype=ids.dtype))
    return images if choice == "only" else ~images if choice == "drop" else torch.ones_like(images)
