"""Unintended features: read from a table, or found by swapping an attribute of texts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from fsspec.core import url_to_fs
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.annotation.tables import read_unintended as read_judged
from ..create_training_data.swaps import read_word_pairs, swapped_pairs
from ..evaluation.detection.metrics import mean_by_text
from ..latents.hidden_states import HiddenStateReader
from ..latents.text_states import OUTLIER, usual_states
from ..latents.texts import read_column
from ..modeling import SparseAutoencoder
from ..training.heads.unintended import counterfactual_features, read_feature_table


def read_unintended(path: str | Path, sae: SparseAutoencoder, judgements: Sequence[int] = (0,)) -> list[int]:
    """The features of a list (.txt, .csv, .json), or those that a table of `judge` (.tsv, .parquet), which is as
    SelfReg's authors write theirs, calls unintended.

    Args:
        path: a file, or an fsspec URL such as `hf://datasets/OWNER/NAME/judged.tsv`.
        sae: whose features they are.
        judgements: of a judged table: those that must all say so, by number.

    Raises:
        ValueError: it is no such table, or a feature is not one of the SAE's.
        OSError: it cannot be read.
    """
    if "://" not in str(path):
        return _read_table(Path(path), sae, judgements)
    files, place = url_to_fs(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / Path(place).name
        files.get_file(place, str(copy))
        return _read_table(copy, sae, judgements)


def _read_table(table: Path, sae: SparseAutoencoder, judgements: Sequence[int]) -> list[int]:
    if not table.is_file():
        raise FileNotFoundError(f"There is no file {str(table)!r}.")
    judged = table.suffix == ".parquet"
    if not judged:
        with table.open(encoding="utf-8") as file:
            judged = "Task" in file.readline().split("\t")
    if judged:
        return read_judged(table, judgements)
    return read_feature_table(table, sae.config.d_sae).tolist()


def read_swaps(original: str, swapped: str, column: str = "text") -> tuple[list[str], list[str]]:
    """Texts of two files, row by row the same with an attribute swapped."""
    return read_column(original, column, keep_empty=True), read_column(swapped, column, keep_empty=True)


def make_swaps(texts: Sequence[str], words: str) -> tuple[list[str], list[str]]:
    """The texts that have one of the words of `he:she,him:her`, and what they become when these are swapped."""
    return swapped_pairs(texts, read_word_pairs(words))


class PooledTokens:
    """Hidden states of tokens at the SAE's hook point, as a classifier's pooling counts them."""

    def __init__(self, model: PreTrainedModel, sae: SparseAutoencoder, pooling: str, tokens_per_batch: int) -> None:
        self.place, self.sae, self.pooling = sae.config.read_at, sae.to(model.device), pooling
        self.reader, self.tokens_per_batch = HiddenStateReader(model, [self.place]), tokens_per_batch
        self.max_norm: float | None = None

    def read(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """States (n, d_in) of the tokens that count and the text of each (n,)."""
        counted = [torch.arange(len(row) - 1 if self.pooling == "last" else 0, len(row)) for row in ids]
        found = self.reader.read(ids, counted, dtype=torch.float32, tokens_at_once=self.tokens_per_batch)
        states = found[self.place]
        texts = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(places) for places in counted]))
        if self.max_norm is not None:
            kept = usual_states(states, texts, len(ids), self.max_norm)
            states, texts = states[kept.to(states.device)], texts[kept]
        return states, texts

    def usual_norm(self, ids: Sequence[Tensor]) -> float | None:
        """Ten times the median norm: the first token and a few others are far beyond. None where one token counts."""
        return OUTLIER * float(self.read(ids)[0].norm(dim=-1).median()) if self.pooling == "mean" else None


class SwappedTexts(NamedTuple):
    """Token ids of texts, and of the same with an attribute swapped, row by row."""

    original: list[Tensor]
    swapped: list[Tensor]


class SwapParts(NamedTuple):
    """Pairs in three parts: what reacts to the swap is found on the first, how much is taken out is chosen on the
    second, and the third measures."""

    found: SwappedTexts
    chosen: SwappedTexts
    measured: SwappedTexts


def split_swaps(original: Sequence[Tensor], swapped: Sequence[Tensor], seed: int = 0) -> SwapParts:
    """The pairs in which anything differs, in thirds.

    Args:
        original, swapped: token ids (length,) of each text, and of the same with an attribute swapped.
        seed: of the order.

    Raises:
        ValueError: fewer than three rows change.
    """
    pairs = [pair for pair in zip(original, swapped, strict=True) if not torch.equal(*pair)]
    if len(pairs) < 3:
        raise ValueError(f"A swap must change three rows or more, within `max_length`. Received: {len(pairs)}.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    third = len(pairs) // 3
    parts = (order[:third], order[third : 2 * third], order[2 * third :])
    return SwapParts(*(SwappedTexts(*map(list, zip(*[pairs[i] for i in part], strict=True))) for part in parts))


class SwapReactions(NamedTuple):
    """What moves when an attribute is swapped. features: (m,) int64, the one that reacts most first. original,
    swapped: (n, d_in) float32, pooled states of both sides."""

    features: Tensor
    original: Tensor
    swapped: Tensor


def find_reactions(reading: PooledTokens, texts: SwappedTexts, top: int) -> SwapReactions:
    """The features that react most to swaps, `top` of them at most, and the states of both sides."""
    (first, rows), (second, others) = (reading.read(side) for side in texts)
    found = counterfactual_features(reading.sae, first, second, texts=(rows, others), top=top)["indices"]
    n = len(texts.original)
    return SwapReactions(found, mean_by_text(first.cpu(), rows, n), mean_by_text(second.cpu(), others, n))
