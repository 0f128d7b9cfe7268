"""The tokens of spans with their activations: what a page needs to colour a span.

`spans` keeps where each latent is strongest, and not how strong it is around that. The winning texts are read once
more here; the activations are those of the whole text, not of the span alone.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.hidden_states import HiddenStateReader
from ...latents.texts import TextSource
from ..harvest.store import Store
from .settings import SpanSettings
from .tokens import TextTokens, text_tokens

CODES_AT_ONCE = 2048  # tokens of an encoding
CLOSE = 0.02  # a maximum that is read again may differ so much: batches differ, and so does rounding


@dataclass(frozen=True)
class SpanOrigin:
    """What spans were collected with.

    Args:
        model, tokenizer: a base, or a model with SAEs, whose base is read.
        sae: whose latents they are of.
        source: rows of text.
        settings: how they were found.
    """

    model: Any
    tokenizer: Any
    sae: Any
    source: TextSource
    settings: SpanSettings = field(default_factory=SpanSettings)


class SpanTokens(NamedTuple):
    """A span and what follows it.

    text: number of the row. tokens: their characters, in order. activations: of the latent, nan where a token does not
    count, such as a text's first. peak: place of the strongest token that the span was chosen for.
    """

    text: int
    tokens: list[str]
    activations: list[float]
    peak: int


def read_span_index(folder: str) -> dict[str, Any]:
    """What the spans in a folder are of: place, settings, the facts of the `source`, hashes of the weights.

    Raises:
        FileNotFoundError: the folder does not say.
    """
    index = Store(f"{folder.rstrip('/')}/work").read_json("index.json")
    if index is None:
        raise FileNotFoundError(
            f"Expected a folder that `sae-transformers spans` wrote, with work/index.json. Received: {folder!r}."
        )
    return index


@torch.no_grad()
def read_span_tokens(
    origin: SpanOrigin,
    spans: Mapping[str, Any],
    *,
    after: int = 8,
    max_tokens: int = 0,
    visit: Callable[[Tensor, Tensor], object] | None = None,
    report: Callable[[int], object] | None = None,
) -> list[SpanTokens]:
    """Read the texts of spans again, and each token's activation of the span's latent.

    Args:
        origin: what the spans were collected with.
        spans: columns of spans.parquet, or some of its rows: feature, text_id, score, position, start, end (n,).
        after: tokens behind the span that are shown too.
        max_tokens: read the first blocks of text whole until so many tokens went by; 0 reads the spans' texts alone.
        visit: called with the sparse codes (indices, values) (n_tokens, width) of these tokens.
        report: called with the number of tokens after each batch.

    Returns:
        One entry a span, in their order.

    Raises:
        ValueError: the texts or the weights are others than those of the spans.
    """
    sae, settings = origin.sae, origin.settings
    place = sae.config.read_at
    base = getattr(origin.model, "lm", origin.model)
    reader = HiddenStateReader(base, [place], config=origin.model.config)
    size = settings.rows_per_block
    entries: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # block, row in it -> spans
    for number, text in enumerate(spans["text_id"].tolist()):
        entries[text // size][text % size].append(number)
    found: list[SpanTokens | None] = [None] * len(spans["text_id"])
    seen, last = 0, max(entries, default=-1)
    ahead = itertools.takewhile(lambda n: n <= last or seen < max_tokens, itertools.count())
    wanted = (n for n in ahead if n in entries or seen < max_tokens)
    for block, rows in origin.source.blocks(size, wanted):
        whole = seen < max_tokens
        members = [i for i in range(len(rows.texts)) if whole or i in entries[block]]
        texts = [rows.texts[i] for i in members]
        tokens = text_tokens(origin.tokenizer, texts, settings)
        counts = torch.tensor([len(one.counted) for one in tokens])
        if int(counts.sum()):
            hidden = reader.read(
                [one.ids for one in tokens],
                [one.counted for one in tokens],
                tokens_at_once=settings.tokens_per_batch,
                report=report and (lambda done, counts=counts: report(int(counts[done].sum()))),
            )[place]
            inside = torch.ones(len(hidden), dtype=torch.bool)
            if settings.outlier_ratio is not None:
                norms = hidden.float().norm(dim=-1)
                inside = (norms <= settings.outlier_ratio * norms.median()).cpu()
            for part, counted in zip(hidden.split(CODES_AT_ONCE), inside.split(CODES_AT_ONCE), strict=True):
                if visit is None or not whole:
                    break
                codes = sae.encode_sparse(part[counted.to(part.device)].to(device=sae.device, dtype=sae.dtype))
                visit(codes.indices, codes.values)
            parts = tokens, texts, hidden.split(counts.tolist()), inside.split(counts.tolist())
            for row, read in zip(members, map(_ReadText, *parts), strict=True):
                if numbers := entries[block].get(row):
                    for number, one in _with_activations(numbers, spans, origin, read, after):
                        found[number] = one
            if whole:
                seen += int(counts.sum())
    if missing := sum(one is None for one in found):
        raise ValueError(f"The text must be the one of the spans. Received: one without {missing} of their rows.")
    return [one for one in found if one is not None]


class _ReadText(NamedTuple):
    """tokens, text: of a row. hidden: (n_counted, d_in). inside: (n_counted,) bool, those that are no outliers."""

    tokens: TextTokens
    text: str
    hidden: Tensor
    inside: Tensor


def _with_activations(
    numbers: list[int], spans: Mapping[str, Any], origin: SpanOrigin, read: _ReadText, after: int
) -> Iterator[tuple[int, SpanTokens]]:
    """The spans `numbers`, which are of one text, with the activations of their tokens."""
    tokens, text, hidden, inside = read
    sae, settings = origin.sae, origin.settings
    features = torch.unique(spans["feature"][numbers])
    hidden, on = hidden.to(sae.device), features.to(sae.device)
    own = settings.activation == "own"
    latents = sae.encode_selected(hidden, on) if own else sae.encode_pre_acts(hidden, on).relu()
    values = torch.full((len(tokens.start), len(features)), math.nan)  # (tokens of the text, features)
    values[tokens.counted[inside] - tokens.first] = latents.float().cpu()[inside]
    for number in numbers:
        start, end, score = (spans[name][number].item() for name in ("start", "end", "score"))
        peak = int(spans["position"][number])
        begin = max(0, min(peak, peak + settings.include_peak - settings.window))
        stop = min(len(tokens.start), peak + 1 + after)
        column = values[:, int(torch.searchsorted(features, spans["feature"][number]))]
        if peak >= len(column) or text[start:end] != spans["span"][number]:
            raise ValueError("The text must be the one of the spans. Received: one with other characters there.")
        if not abs(float(column[peak]) - score) <= CLOSE * abs(score):
            raise ValueError(
                f"Expected the model and SAE of the spans. Received: activation {float(column[peak]):.4g} of feature "
                f"{int(spans['feature'][number])}, where the spans say {score:.4g}."
            )
        cuts = [*tokens.start[begin:stop].tolist(), int(tokens.end[stop - 1])]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        yield number, _whole_characters(int(spans["text_id"][number]), pieces, column[begin:stop], peak - begin)


def _whole_characters(text: int, pieces: list[str], activations: Tensor, peak: int) -> SpanTokens:
    """Tokens that are parts of one character become one, with the strongest activation of them."""
    tokens: list[str] = []
    values: list[float] = []
    place, waiting = 0, math.nan
    for number, (piece, value) in enumerate(zip(pieces, activations.tolist(), strict=True)):
        waiting = value if math.isnan(waiting) else waiting if math.isnan(value) else max(waiting, value)
        if number == peak:
            place = len(tokens)
        if piece or number == len(pieces) - 1:
            tokens.append(piece)
            values.append(waiting)
            waiting = math.nan
    return SpanTokens(text, tokens, values, place)
