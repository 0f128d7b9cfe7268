"""How strongly each latent fires: histograms of its activations, gathered from sparse codes as texts go by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST = -16, 16  # powers of two: what is outside counts in the first or the last bin
PER_OCTAVE = 8  # bins of a factor of two: the upper end of a bin is 9 % above the lower one


class Histogram(NamedTuple):
    """Of one latent. edges: (n + 1,) ascending, logarithmic. counts: (n,), tokens with a value in [edge, next)."""

    edges: list[float]
    counts: list[int]


class ActivationHistograms:
    """Counts of activations of every latent in logarithmic bins, the same for all latents.

    Memory is (d_sae, 256) int32 whatever the number of tokens. Bins are not chosen from the data, so that one pass is
    enough; `of` merges them for display. Negative activations count by their size.

    Args:
        d_sae: number of latents.
    """

    def __init__(self, d_sae: int) -> None:
        if d_sae < 1:
            raise ValueError(f"`d_sae` must be 1 or more. Received: d_sae={d_sae!r}.")
        self.n_bins = (HIGHEST - LOWEST) * PER_OCTAVE
        self.counts = torch.zeros(d_sae, self.n_bins, dtype=torch.int32)
        self.maxima = torch.zeros(d_sae)
        self.n_tokens = 0

    @torch.no_grad()
    def add(self, indices: Tensor, values: Tensor) -> None:
        """Count the latents of some tokens.

        Args:
            indices, values: (n_tokens, width), as `SparseAutoencoder.encode_sparse` gives them; zeros do not count.

        Raises:
            ValueError: shapes differ, or a value is not finite.
        """
        if indices.shape != values.shape or indices.ndim != 2:
            raise ValueError(
                f"Expected indices and values of one shape (n_tokens, width). Received: {tuple(indices.shape)} and "
                f"{tuple(values.shape)}."
            )
        self.n_tokens += len(indices)
        on = values != 0
        latents, sizes = indices[on].cpu(), values[on].abs().float().cpu()
        if not bool(torch.isfinite(sizes).all()):
            raise ValueError(f"Activations must be finite. Received: {int((~sizes.isfinite()).sum())} that are not.")
        bins = ((sizes.log2() - LOWEST) * PER_OCTAVE).floor().long().clamp_(0, self.n_bins - 1)
        self.counts.view(-1).index_add_(0, latents * self.n_bins + bins, torch.ones_like(bins, dtype=torch.int32))
        self.maxima.scatter_reduce_(0, latents, sizes, "amax")

    def active(self) -> Tensor:
        """On how many tokens each latent fired, (d_sae,) int64."""
        return self.counts.sum(1)

    def of(self, latent: int, most_bins: int = 32) -> Histogram:
        """The bins from the first to the last that is not empty, neighbours merged until there are few enough."""
        row = self.counts[latent]
        used = row.nonzero()[:, 0].tolist()
        if not used:
            return Histogram([], [])
        first, stop = used[0], used[-1] + 1
        merged = 1
        while -(-stop // merged) - first // merged > most_bins:
            merged *= 2
        first, stop = first // merged * merged, -(-stop // merged) * merged
        counts = row[first:stop].view(-1, merged).sum(1).tolist()
        return Histogram([2 ** (LOWEST + edge / PER_OCTAVE) for edge in range(first, stop + 1, merged)], counts)
