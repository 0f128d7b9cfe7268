"""The endpoints about features: what there is, and how strongly one answers to texts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..latents.annotations.search import search
from ..modeling import SparseAutoencoderConfig
from .bodies import Body, wrong
from .memory import give_back, is_out_of_memory, no_memory
from .prompts import PromptReader
from .steering_field import LONGEST_NAME

TEXTS_AT_ONCE, MAX_TEXTS = 16, 2048
# Of a forward pass, padding included, but for a text that is longer alone; and of all texts of a request.
TOKENS_AT_ONCE, MAX_TOKENS = 16_384, 2**20
MOST_FOUND = 100  # features that one search answers
POOLINGS = ("mean", "max", "last")


@dataclass(frozen=True)
class Detecting:
    """A request to detect. ids: token ids of each text."""

    ids: tuple[tuple[int, ...], ...]
    sae: int
    feature: int | str
    pooling: str
    pre_activations: bool
    skip_first: int
    per_token: bool


def read_detection(reader: PromptReader, body: Body) -> Detecting:
    reader.check_model(body)
    texts = body.take("input")
    texts = [texts] if isinstance(texts, str) else texts
    if (
        not isinstance(texts, list)
        or not texts
        or len(texts) > MAX_TEXTS
        or not all(isinstance(t, str) for t in texts)
    ):
        raise wrong("input", f"must be a text or a list of up to {MAX_TEXTS}", texts)
    saes = reader.saes
    if not saes:
        raise wrong("model", "has no SAE, so no features", reader.names[0])
    sae = body.whole("sae", 0, 0, len(saes) - 1)
    feature = body.take("feature")
    if isinstance(feature, bool) or not isinstance(feature, (int, str)):
        raise wrong("feature", "must be the number of a latent or the name of a concept", feature)
    if isinstance(feature, str) and len(feature) > LONGEST_NAME:
        raise wrong("feature", f"must be a name of at most {LONGEST_NAME} characters", feature)
    try:
        saes[sae].resolve_feature(feature)
    except (ValueError, IndexError, TypeError) as error:
        raise wrong("feature", f"is not there. {error}", feature) from error
    pooling = body.text("pooling", "mean")
    if pooling not in POOLINGS:
        raise wrong("pooling", f"must be one of {', '.join(POOLINGS)}", pooling)
    pre_activations = body.truth("pre_activations", False)
    skip_first = body.whole("skip_first", 1)
    per_token = body.truth("per_token", False)
    body.ignore("user")
    body.end()
    for place, text in enumerate(texts):  # all, before any is worked on
        reader.check_length([text], f"input[{place}]")
    ids: list[list[int]] = []
    left = MAX_TOKENS
    for place, text in enumerate(texts):
        row = reader.encode(text, f"input[{place}]")
        if not skip_first < len(row) <= reader.context:
            raise wrong(f"input[{place}]", f"must have {skip_first + 1} to {reader.context} tokens", len(row))
        left -= len(row)
        if left < 0:
            raise wrong("input", f"must have at most {MAX_TOKENS} tokens in all", f"more in {place + 1} texts")
        ids.append(row)
    return Detecting(tuple(map(tuple, ids)), sae, feature, pooling, pre_activations, skip_first, per_token)


class Detector:
    """Scores texts by features of a model, unsteered whatever its default; one request at a time."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._one = threading.Lock()

    @torch.no_grad()
    def detect(self, asked: Detecting, given_up: threading.Event | None = None) -> dict[str, Any]:
        """The answer to a request. given_up: set from outside when nobody waits for it any more.

        Raises:
            RequestError: there is not enough memory, even for a text alone.
        """
        order = sorted(range(len(asked.ids)), key=lambda row: len(asked.ids[row]))
        found: dict[int, dict[str, Any]] = {}
        with self._one, self.model.steered(None):
            for rows in _batches(order, [len(row) for row in asked.ids]):
                if given_up is not None and given_up.is_set():
                    break
                for row, entry in zip(rows, self._scores(asked, [asked.ids[row] for row in rows]), strict=True):
                    found[row] = {"object": "detection", "index": row, **entry}
        total = sum(len(row) for row in asked.ids)
        return {
            "object": "list",
            "model": self.name,
            "sae": asked.sae,
            "feature": self.model.config.sae_configs[asked.sae].resolve_feature(asked.feature),
            "pooling": asked.pooling,
            "data": [found[row] for row in sorted(found)],
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }

    def _scores(self, asked: Detecting, ids: list[tuple[int, ...]]) -> list[dict[str, Any]]:
        """Of texts together or, where memory is wanting, of halves of them."""
        try:
            return self._together(asked, ids)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        give_back(self.model.device)
        if len(ids) == 1:
            raise no_memory(f"a text of {len(ids[0])} tokens has no room")
        half = len(ids) // 2
        return [*self._scores(asked, ids[:half]), *self._scores(asked, ids[half:])]

    def _together(self, asked: Detecting, ids: list[tuple[int, ...]]) -> list[dict[str, Any]]:
        width = max(len(row) for row in ids)
        batch = {
            "input_ids": torch.tensor([[*row, *[0] * (width - len(row))] for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        }
        result = self.model.detect(
            batch, feature=asked.feature, sae=asked.sae, pooling=asked.pooling,
            pre_activations=asked.pre_activations, skip_first=asked.skip_first,
        )  # fmt: skip
        entries: list[dict[str, Any]] = [{"score": score} for score in result.per_text.tolist()]
        if asked.per_token:
            for entry, row, values in zip(entries, ids, result.per_token.tolist(), strict=True):
                entry["tokens"] = [self.tokenizer.decode([token]) for token in row]
                entry["values"] = values[: len(row)]
        return entries


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows that are read together. order: the rows, shorter ones first."""
    rows: list[int] = []
    for row in order:
        if len(rows) == TEXTS_AT_ONCE or (rows and (len(rows) + 1) * lengths[row] > TOKENS_AT_ONCE):
            yield rows
            rows = []
        rows.append(row)
    yield rows


def describe_saes(saes: Sequence[SparseAutoencoderConfig]) -> dict[str, Any]:
    """A model's SAEs, with the concepts that have names."""
    data = [
        {
            "object": "sae",
            "sae": number,
            "place": config.read_at,
            "n_features": config.d_sae,
            "activation": config.activation,
            "concepts": dict(config.concepts),
            "feature_names": dict(config.feature_names),
            "annotations": None if config.annotations is None else config.annotations.to_dict(),
        }
        for number, config in enumerate(saes)
    ]
    return {"object": "list", "data": data}


def find_features(saes: Sequence[SparseAutoencoderConfig], query: str, k: str) -> dict[str, Any]:
    """The features of all SAEs whose descriptions fit some words, best first, by the words alone.

    Raises:
        RequestError: there are no words, too many, or more features than one answer has.
    """
    if not query.strip() or len(query) > LONGEST_NAME:
        raise wrong("query", f"must be a few words, at most {LONGEST_NAME} characters", query)
    most = int(k) if k.isascii() and k.isdecimal() and len(k) < 6 else 0
    if not 1 <= most <= MOST_FOUND:
        raise wrong("k", f"must be a whole number from 1 to {MOST_FOUND}", k)
    found = [
        {"object": "feature", "sae": number, **row}
        for number, config in enumerate(saes)
        if (notes := config.annotations) is not None
        for row in search(notes, query, most)
    ]
    return {"object": "list", "data": sorted(found, key=lambda row: -row["rank"])[:most]}
