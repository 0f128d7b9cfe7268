"""Texts in a template as a classifier reads them: what is too long loses the end of the text, never the template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .template_texts import PLACEHOLDER, full_template


class TemplatedText(NamedTuple):
    """A text in its template. ids: (length,) int64. prefix: how many of them, special tokens included, come before the
    text's first token; a token that has a character of the text is the text's."""

    ids: Tensor
    prefix: int


def templated_ids(
    tokenizer: Any, texts: Sequence[str], template: str = PLACEHOLDER, max_length: int = 256
) -> list[Tensor]:
    """Token ids of each text in its template, (length,) int64; see `templated_texts`."""
    return [row.ids for row in templated_texts(tokenizer, texts, template, max_length)]


def templated_texts(
    tokenizer: Any, texts: Sequence[str], template: str = PLACEHOLDER, max_length: int = 256
) -> list[TemplatedText]:
    """Tokens of each text in its template.

    Args:
        tokenizer: a fast one, which knows the characters of its tokens.
        texts: any; an empty one needs a template with words of its own.
        template: with `{text}` once, or the name of a task, see `full_template`.
        max_length: tokens of a sequence, template and special tokens included.

    Returns:
        One each, 1 <= length <= max_length.

    Raises:
        ValueError: a slow tokenizer, `{text}` is not there once, the template alone is too long, or nothing is left.
    """
    template = full_template(template, tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"A fast tokenizer is needed. Received: {type(tokenizer).__name__}.")
    if max_length < 1:
        raise ValueError(f"`max_length` must be 1 or more. Received: max_length={max_length!r}.")
    before, after = template.split(PLACEHOLDER)
    special = not (tokenizer.bos_token and before.startswith(tokenizer.bos_token))
    left = list(texts)
    found = [TemplatedText(torch.empty(0, dtype=torch.long), 0)] * len(left)
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
                prefix = next((i for i, (_, end) in enumerate(places) if end > len(before)), len(ids))
                found[row] = TemplatedText(torch.tensor(ids, dtype=torch.long), prefix)
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
