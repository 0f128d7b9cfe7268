"""Which tokens of a text count for spans, and which characters each of them stands for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
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


def span_bounds(
    tokens: Sequence[TextTokens], of_text: Tensor, peak: Tensor, settings: SpanSettings
) -> tuple[Tensor, Tensor]:
    """First and last character + 1 of spans, (n,) int64 each.

    Args:
        of_text: (n,) int64, each one's place in `tokens`.
        peak: (n,) int64, the text's own token at which each one's maximum is.
    """
    start, end = (torch.cat([getattr(one, name) for one in tokens]) for name in ("start", "end"))
    lengths = torch.tensor([len(one.start) for one in tokens])
    before = (lengths.cumsum(0) - lengths)[of_text]  # tokens of earlier texts
    stop = peak + 1 if settings.include_peak else peak
    begin = (stop - settings.window).clamp(min=0)
    filled = begin < stop
    first = start[before + torch.where(filled, begin, peak)]
    return first, torch.where(filled, end[before + (stop - 1).clamp(min=0)], first)


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
    lengths = [len(ids) for ids in encoded["input_ids"]]
    rows = torch.arange(len(filled)).repeat_interleave(torch.tensor(lengths))  # of each token its text
    places = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor(list(chain.from_iterable(encoded["input_ids"])), dtype=torch.long)
    pairs = chain.from_iterable(chain.from_iterable(encoded["offset_mapping"]))
    start, end = (torch.tensor(list(pairs), dtype=torch.long).view(-1, 2) - len(before)).unbind(1)
    size = torch.tensor([len(texts[i]) for i in filled])[rows]
    inside = (end > 0) & (start < size) & (start >= -space_before) & (end <= size + space_after)
    first, stop = torch.full((len(filled),), max(lengths)), torch.zeros(len(filled), dtype=torch.long)
    first.scatter_reduce_(0, rows[inside], places[inside], "amin")
    stop.scatter_reduce_(0, rows[inside], places[inside] + 1, "amax")
    first = torch.minimum(first, stop)  # both 0 where nothing is inside
    own = (places >= first[rows]) & (places < stop[rows])
    counted = own & (places >= settings.skip_first)
    if settings.last_tokens:
        counted &= places >= stop[rows] - settings.last_tokens
    sizes = (stop - first).tolist()
    start, end = (torch.minimum(part[own].clamp(min=0), size[own]).split(sizes) for part in (start, end))
    among = places[counted].split(torch.bincount(rows[counted], minlength=len(filled)).tolist())
    parts = zip(filled, ids.split(lengths), first.tolist(), start, end, among, strict=True)
    for i, *of_text in parts:
        found[i] = TextTokens(*of_text)
    return found
