"""Texts in a template as a classifier reads them: what is too long loses the end of the text, never the template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .spans.settings import PLACEHOLDER


def templated_ids(
    tokenizer: Any, texts: Sequence[str], template: str = PLACEHOLDER, max_length: int = 256
) -> list[Tensor]:
    """Token ids of each text in its template.

    Args:
        tokenizer: a fast one, which knows the characters of its tokens.
        texts: any; an empty one needs a template with words of its own.
        template: with `{text}` once.
        max_length: tokens of a sequence, template and special tokens included.

    Returns:
        (length,) int64 each, 1 <= length <= max_length.

    Raises:
        ValueError: a slow tokenizer, `{text}` is not there once, the template alone is too long, or nothing is left.
    """
    if template.count(PLACEHOLDER) != 1:
        raise ValueError(f"`template` must have {PLACEHOLDER} once. Received: template={template!r}.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"A fast tokenizer is needed. Received: {type(tokenizer).__name__}.")
    if max_length < 1:
        raise ValueError(f"`max_length` must be 1 or more. Received: max_length={max_length!r}.")
    before, after = template.split(PLACEHOLDER)
    special = not (tokenizer.bos_token and before.startswith(tokenizer.bos_token))
    left = list(texts)
    found: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(left)
    open_rows = list(range(len(left)))
    while open_rows:
        encoded = tokenizer(
            [f"{before}{left[row]}{after}" for row in open_rows],
            add_special_tokens=special,
            return_offsets_mapping=True,
            verbose=False,
        )
        too_long = []
        for row, ids, places in zip(open_rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            excess = len(ids) - max_length
            if excess <= 0:
                if not ids:
                    raise ValueError(f"A text without tokens needs a template. Received: text {row}, {left[row]!r}.")
                found[row] = torch.tensor(ids, dtype=torch.long)
                continue
            starts = [begin - len(before) for begin, end in places if end > begin]
            inside = [start for start in starts if 0 < start < len(left[row])]
            if not left[row]:
                raise ValueError(
                    f"The template alone has {len(ids)} tokens; shorten it or raise `max_length`. "
                    f"Received: max_length={max_length!r}."
                )
            left[row] = left[row][: inside[-excess]] if excess <= len(inside) else ""
            too_long.append(row)
        open_rows = too_long
    return found
