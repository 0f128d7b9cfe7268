"""Which tokens of a text count for spans, and which characters each of them stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..template_texts import PLACEHOLDER, full_template
from .settings import MAX_LENGTH, SpanSettings


class TextTokens(NamedTuple):
    """A text as the model reads it.

    ids: (length,) int64, template and special tokens included.
    first: place of the text's first token in `ids`.
    start, end: (n,) int64, characters of the text's own tokens, counted from where the text begins.
    counted: (m,) int64, places in `ids` of the tokens that count.
    """

    ids: Tensor
    first: int
    start: Tensor
    end: Tensor
    counted: Tensor

    def spans(self, positions: Sequence[int], settings: SpanSettings) -> list[tuple[int, int]]:
        """First and last character + 1 of the spans whose maxima are at the text's tokens `positions`."""
        start, end = self.start.tolist(), self.end.tolist()
        found: list[tuple[int, int]] = []
        for position in positions:
            stop = position + 1 if settings.include_peak else position
            begin = max(0, stop - settings.window)
            found.append((start[begin], end[stop - 1]) if begin < stop else (start[position], start[position]))
        return found


def text_tokens(tokenizer: Any, texts: Sequence[str], settings: SpanSettings) -> list[TextTokens]:
    """The tokens of each text in its template; of a text of white space alone there are none.

    A token is the text's own if its characters, by the tokenizer's own account, lie inside the text; white space of
    the template that it takes along ("of: {text}" may give a token " The") is not held against it. Special tokens are
    added as the tokenizer does, unless the template brings its own beginning token.

    Raises:
        ValueError: the tokenizer does not give the characters of its tokens (it is not a fast one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Spans need a fast tokenizer, which knows the characters of its tokens. Received: "
            f"{type(tokenizer).__name__}."
        )
    before, after = full_template(settings.template, tokenizer).split(PLACEHOLDER)
    own_beginning = bool(tokenizer.bos_token) and before.startswith(tokenizer.bos_token)
    filled = [i for i, text in enumerate(texts) if text.strip()]
    nothing = torch.empty(0, dtype=torch.long)
    found = [TextTokens(nothing, 0, nothing, nothing, nothing)] * len(texts)
    if not filled:
        return found
    encoded = tokenizer(
        [f"{before}{texts[i]}{after}" for i in filled],
        add_special_tokens=not own_beginning,
        return_attention_mask=False,
        return_offsets_mapping=True,
        truncation=True,
        max_length=settings.max_length or MAX_LENGTH,
        verbose=False,
    )
    space_before = len(before) - len(before.rstrip())
    space_after = len(after) - len(after.lstrip())
    for i, ids, characters in zip(filled, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        size = len(texts[i])
        start, end = (torch.tensor(characters, dtype=torch.long).view(-1, 2) - len(before)).unbind(1)
        inside = (end > 0) & (start < size) & (start >= -space_before) & (end <= size + space_after)
        places = inside.nonzero()[:, 0]
        first, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        counted = torch.arange(first, stop)[-(settings.last_tokens or stop + 1) :]
        counted = counted[counted >= settings.skip_first]
        own = slice(first, stop)
        found[i] = TextTokens(
            torch.tensor(ids, dtype=torch.long), first, start[own].clamp(0, size), end[own].clamp(0, size), counted
        )
    return found
