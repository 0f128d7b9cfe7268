"""The largest activation of each latent on given hidden states: the unit `max` of steering."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def measure_feature_max(sae: Any, hidden: Tensor | Iterable[Tensor], tokens_per_batch: int) -> Tensor:
    """See `SparseAutoencoder.measure_feature_max`."""
    maxima, seen = torch.zeros(sae.config.d_sae, dtype=sae.dtype, device=sae.device), 0
    for part in [hidden] if isinstance(hidden, Tensor) else hidden:
        if part.ndim != 2 or part.shape[-1] != sae.config.d_in:
            raise ValueError(
                f"Expected hidden states (n_tokens, {sae.config.d_in}). Received: shape {tuple(part.shape)}."
            )
        for states in part.split(tokens_per_batch):
            active = sae.encode_sparse(states.to(device=sae.device, dtype=sae.dtype))
            maxima.scatter_reduce_(0, active.indices.flatten(), active.values.abs().flatten(), "amax")
            seen += len(states)
    if not seen:
        raise ValueError("Expected hidden states of a token or more. Received: none.")
    if not bool(maxima.isfinite().all()):
        raise ValueError("Expected finite hidden states. Received: some with NaN or infinite latents; leave them out.")
    sae.feature_max.copy_(maxima)
    return maxima
