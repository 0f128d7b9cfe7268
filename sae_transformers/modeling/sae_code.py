"""What an SAE makes of hidden states: its normalised input, and all latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .outputs import SparseFeatures

# Share of active latents below which gathering decoder rows beat the dense product on CPU at every size measured.
SPARSE_DECODE_BELOW = 0.02


class Normalized(NamedTuple):
    """A normalised input and how to undo it: `hidden ~ x * scale + mean`; None for what is not there."""

    x: Tensor
    scale: Tensor | float | None
    mean: Tensor | None


class Code(NamedTuple):
    """All latents of the tokens at hand: `SparseFeatures` for top-k activations, (..., d_sae) for the others.

    pre_acts: (..., d_sae).
    """

    pre_acts: Tensor
    latents: Tensor | SparseFeatures

    def dense(self) -> Tensor:
        """Latents (..., d_sae)."""
        return self.latents if isinstance(self.latents, Tensor) else self.latents.to_dense()

    def sparse(self) -> SparseFeatures:
        """The active latents of each token."""
        return SparseFeatures.from_dense(self.latents) if isinstance(self.latents, Tensor) else self.latents

    def decoded(self, W_dec: Tensor) -> Tensor:
        """`z @ W_dec`, (..., d_out), from the active latents alone where they are known."""
        if isinstance(self.latents, Tensor):
            return _dense_decoded(self.latents, W_dec)
        indices, values, _ = self.latents
        k = indices.shape[-1]
        flat = F.embedding_bag(indices.reshape(-1, k), W_dec, per_sample_weights=values.reshape(-1, k), mode="sum")
        return flat.view(*indices.shape[:-1], flat.shape[-1])


def _dense_decoded(latents: Tensor, W_dec: Tensor) -> Tensor:
    if latents.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        rows = latents.reshape(-1, latents.shape[-1])
        row, column = rows.nonzero(as_tuple=True)
        if len(row) < SPARSE_DECODE_BELOW * rows.numel():
            starts = torch.searchsorted(row, torch.arange(len(rows)))
            flat = F.embedding_bag(column, W_dec, starts, per_sample_weights=rows[row, column], mode="sum")
            return flat.view(*latents.shape[:-1], flat.shape[-1])
    return latents @ W_dec
