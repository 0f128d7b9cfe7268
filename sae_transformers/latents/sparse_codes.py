"""Latents of many texts, the non-zeros alone, latent by latent: what statistics over texts and features start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling import SparseAutoencoder

POOLINGS = ("mean", "max", "sum", "count")


class SparseCodes(NamedTuple):
    """A matrix (n_rows, d_sae) without its zeros, on the CPU, ordered by latent and then by row.

    latents, rows: (nnz,) int64. values: (nnz,) float64. n_rows: of the texts (or tokens). d_sae: of the latents.
    """

    latents: Tensor
    rows: Tensor
    values: Tensor
    n_rows: int
    d_sae: int

    @classmethod
    def from_dense(cls, matrix: Tensor) -> SparseCodes:
        """The non-zeros of (n_rows, d_sae)."""
        latents, rows = matrix.T.nonzero(as_tuple=True)
        return cls(latents.cpu(), rows.cpu(), matrix[rows, latents].double().cpu(), *matrix.shape)

    def to_dense(self) -> Tensor:
        """The same as one tensor, (n_rows, d_sae) float64: of small matrices only."""
        return self.columns(torch.arange(self.d_sae))

    def columns(self, latents: Tensor) -> Tensor:
        """All rows of some latents (m,), dense: (n_rows, m) float64."""
        latents = latents.cpu()
        first = torch.searchsorted(self.latents, latents)
        counts = torch.searchsorted(self.latents, latents, right=True) - first
        column = torch.arange(len(latents)).repeat_interleave(counts)
        place = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts - first)[column]
        block = torch.zeros(self.n_rows, len(latents), dtype=torch.float64)
        block[self.rows[place], column] = self.values[place]
        return block

    def take_rows(self, rows: Tensor) -> SparseCodes:
        """The rows numbered `rows` (m,), all different, in this order, under new numbers from 0."""
        number = torch.full((self.n_rows,), -1)
        number[rows] = torch.arange(len(rows))
        kept = number[self.rows] >= 0
        latents, renamed, values = self.latents[kept], number[self.rows[kept]], self.values[kept]
        order = (latents * max(1, len(rows)) + renamed).argsort()
        return SparseCodes(latents[order], renamed[order], values[order], len(rows), self.d_sae)

    def sums(self, weights: Tensor | None = None) -> Tensor:
        """Sum over rows, each times its weight (n_rows,) if there are weights: (d_sae,) float64."""
        values = self.values if weights is None else self.values * weights.double().cpu()[self.rows]
        return torch.zeros(self.d_sae, dtype=torch.float64).index_add_(0, self.latents, values)

    def counts(self) -> Tensor:
        """In how many rows each latent is not zero, (d_sae,) int64."""
        return torch.bincount(self.latents, minlength=self.d_sae)

    def live(self) -> Tensor:
        """Latents that are not zero in every row, (m,) int64, ascending."""
        return torch.unique_consecutive(self.latents)


def stack_rows(codes: Sequence[SparseCodes]) -> SparseCodes:
    """The rows of several matrices of one SAE, one matrix after the other."""
    firsts = torch.tensor([0, *(one.n_rows for one in codes)]).cumsum(0).tolist()
    latents = torch.cat([one.latents for one in codes])
    rows = torch.cat([one.rows + first for one, first in zip(codes, firsts[:-1], strict=True)])
    order = (latents * max(1, firsts[-1]) + rows).argsort()
    values = torch.cat([one.values for one in codes])
    return SparseCodes(latents[order], rows[order], values[order], firsts[-1], codes[0].d_sae)


@torch.no_grad()
def encode_texts(
    sae: SparseAutoencoder,
    hidden: Tensor,
    text_index: Tensor | None = None,
    n_texts: int | None = None,
    *,
    pooling: str = "mean",
    tokens_at_once: int = 2048,
) -> SparseCodes:
    """Latents of texts, pooled over each text's tokens; nothing of size (n_tokens, d_sae) is held.

    Args:
        sae: whose latents; its own activation.
        hidden: (n_tokens, d_in), at the place that the SAE reads.
        text_index: (n_tokens,) int64, the text of each token, from 0; by default each token is a row of its own.
        n_texts: number of texts; one more than the largest of `text_index` by default.
        pooling: `mean` or `sum` over a text's tokens, `max` over those where a latent is active, or `count`, their
            number.
        tokens_at_once: of an encoding.

    Returns:
        (n_texts, d_sae) without zeros.

    Raises:
        ValueError: an unknown pooling, shapes that do not fit, or a text without a token.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}. Received: pooling={pooling!r}.")
    if hidden.ndim != 2 or hidden.shape[1] != sae.config.d_in or not len(hidden):
        raise ValueError(f"Expected hidden states (n, {sae.config.d_in}). Received: {tuple(hidden.shape)}.")
    index = torch.arange(len(hidden)) if text_index is None else text_index.cpu()
    n_texts = int(index.max()) + 1 if n_texts is None else n_texts
    lengths = torch.bincount(index, minlength=n_texts)
    if len(index) != len(hidden) or len(lengths) > n_texts or bool((lengths == 0).any()):
        raise ValueError(
            f"Every text needs a token, and every token a text. Received: {len(hidden)} tokens, {n_texts} texts, "
            f"{int((lengths == 0).sum())} of them without a token, a largest index of {len(lengths) - 1}."
        )
    found: list[tuple[Tensor, Tensor]] = []
    for states, texts in zip(hidden.split(tokens_at_once), index.split(tokens_at_once), strict=True):
        indices, values, _ = sae.encode_sparse(states.to(device=sae.device, dtype=sae.dtype))
        indices, values = indices.cpu(), values.cpu()
        on = values != 0
        cells = (indices * n_texts + texts[:, None])[on]  # latent by latent
        found.append(_pooled(cells, values[on].double(), pooling))
    cells, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    cells, values = _pooled(cells, values, "sum" if pooling in ("mean", "count") else pooling)
    latents, rows = cells // n_texts, cells % n_texts
    if pooling == "mean":
        values = values / lengths[rows]
    return SparseCodes(latents, rows, values, n_texts, sae.config.d_sae)


def _pooled(cells: Tensor, values: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """One value for each different cell, cells ascending."""
    cells, members = cells.unique(return_inverse=True)
    result = torch.zeros(len(cells), dtype=torch.float64)
    if pooling == "max":
        return cells, result.scatter_reduce_(0, members, values, "amax", include_self=False)
    return cells, result.index_add_(0, members, torch.ones_like(values) if pooling == "count" else values)
