"""Which tokens of a text count for spans, and which characters each of them stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .span_heap import ACTIVATIONS

PLACEHOLDER = "{text}"


@dataclass(frozen=True)
class SpanSettings:
    """What is taken from a text. The original implementation has `include_peak=False`, `skip_first=False` and
    `outlier_ratio=None`.

    Args:
        top_n: spans of a latent, each of another text.
        window: tokens of a span; fewer where the text begins.
        include_peak: the span ends with the token of the maximum; otherwise with the token before it, so that a
            maximum at the first token gives an empty span.
        activation: `relu` of the pre-activations, whatever the SAE's activation is, or the SAE's `own`.
        min_score: a maximum must be above it.
        template: the text the model reads, with `{text}` where a row goes. Only the row's own tokens count.
        last_tokens: only so many tokens at the end of a text count; None for all. Spans may begin before them.
        skip_first: the first token that the model reads does not count, an outlier in norm (see `kept_positions`).
        outlier_ratio: tokens whose hidden state is so many times as long as the median of their block do not count: a
            few in ten thousand are a hundred times as long, and would be the best span of most latents. None: all do.
        max_length: tokens of a sequence, template included; longer ones are cut at the end.
        rows_per_block: rows of text whose hidden states memory has to hold; a process takes a block at a time.
        tokens_at_once: of a forward pass, padding counted.
        pre_acts_at_once: elements of a (tokens, d_sae) array in memory.
        blocks_per_save: so many blocks at most are done again when a process was killed.
    """

    top_n: int = 10
    window: int = 10
    include_peak: bool = True
    activation: str = "relu"
    min_score: float = 0.0
    template: str = PLACEHOLDER
    last_tokens: int | None = None
    skip_first: bool = True
    outlier_ratio: float | None = 10.0
    max_length: int = 256
    rows_per_block: int = 256
    tokens_at_once: int = 4096
    pre_acts_at_once: int = 2**22
    blocks_per_save: int = 16

    def __post_init__(self) -> None:
        at_least_one = ("top_n", "window", "rows_per_block", "tokens_at_once", "pre_acts_at_once", "blocks_per_save")
        for name in (*at_least_one, "max_length", "last_tokens"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1
            if name == "last_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of {least} or more. Received: {name}={value!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(ACTIVATIONS)}. Received: activation={self.activation!r}."
            )
        if not 0 <= self.min_score < float("inf"):
            raise ValueError(f"`min_score` must be 0 or more. Received: min_score={self.min_score!r}.")
        if self.outlier_ratio is not None and not self.outlier_ratio >= 1:
            raise ValueError(f"`outlier_ratio` must be 1 or more. Received: outlier_ratio={self.outlier_ratio!r}.")
        if self.template.count(PLACEHOLDER) != 1:
            raise ValueError(f"`template` must have {PLACEHOLDER} once. Received: template={self.template!r}.")

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON values; the other sizes change it by rounding only."""
        return {k: v for k, v in asdict(self).items() if not k.endswith("_at_once") and k != "blocks_per_save"}


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

    def span(self, position: int, settings: SpanSettings) -> tuple[int, int]:
        """First and last character + 1 of the span whose maximum is at the text's token `position`."""
        stop = position + 1 if settings.include_peak else position
        begin = max(0, stop - settings.window)
        if begin == stop:
            return int(self.start[position]), int(self.start[position])
        return int(self.start[begin]), int(self.end[stop - 1])


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
    before, after = settings.template.split(PLACEHOLDER)
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
        max_length=settings.max_length,
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
        if settings.skip_first:
            counted = counted[counted > 0]
        own = slice(first, stop)
        found[i] = TextTokens(
            torch.tensor(ids, dtype=torch.long), first, start[own].clamp(0, size), end[own].clamp(0, size), counted
        )
    return found


def template_tokens(tokenizer: Any, template: str, text: str = "text") -> tuple[int, int]:
    """Tokens of a template before and after a text, special tokens included."""
    settings = SpanSettings(template=template, max_length=2**20)
    found = text_tokens(tokenizer, [text], settings)[0]
    return found.first, len(found.ids) - found.first - len(found.start)
