"""Unintended features: read from a table, or found by swapping an attribute of texts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from fsspec.core import url_to_fs
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..create_training_data.annotation.tables import read_unintended as read_judged
from ..create_training_data.swaps import read_word_pairs, swapped_pairs
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

    def find_max_norm(self, ids: Sequence[Tensor]) -> None:
        """Ten times the median: the first token and a few others are far beyond."""
        if self.pooling == "mean":
            self.max_norm = OUTLIER * float(self.read(ids)[0].norm(dim=-1).median())


def find_unintended(
    reading: PooledTokens, original: Sequence[Tensor], swapped: Sequence[Tensor], top: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The features that react most to half of the swaps, and both sides of the other half, which measures.

    Args:
        original, swapped: token ids of each text, and of the same with an attribute swapped.
        top: how many features at most.

    Raises:
        ValueError: fewer than two rows change.
    """
    pairs = [pair for pair in zip(original, swapped, strict=True) if not torch.equal(*pair)]
    if len(pairs) < 2:
        raise ValueError(f"A swap must change two rows or more, within `max_length`. Received: {len(pairs)}.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    judged, held = order[: len(pairs) // 2], order[len(pairs) // 2 :]
    (first, texts), (second, others) = (reading.read([pairs[i][side] for i in judged]) for side in (0, 1))
    features = counterfactual_features(reading.sae, first, second, texts=(texts, others), top=top)["indices"]
    return features, [pairs[i][0] for i in held], [pairs[i][1] for i in held]
