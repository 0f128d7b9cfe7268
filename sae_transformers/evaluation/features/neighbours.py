"""Which latents of an SAE write in nearly the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 1024


class Neighbours(NamedTuple):
    """latents: (n, k) int64, the nearest first. cosines: (n, k) float32, of the decoder rows."""

    latents: Tensor
    cosines: Tensor


@torch.no_grad()
def decoder_neighbours(W_dec: Tensor, k: int, latents: Sequence[int] | None = None) -> Neighbours:
    """The `k` other latents whose decoder rows have the greatest cosine with each latent's own.

    Args:
        W_dec: (d_sae, d_out).
        k: neighbours of a latent, at most d_sae - 1.
        latents: whose neighbours are sought, n of them; all by default. They are sought among all.

    Raises:
        ValueError: `k` is out of range.
    """
    d_sae = len(W_dec)
    if not 1 <= k < d_sae:
        raise ValueError(f"`k` must be in [1, {d_sae - 1}], the other latents there are. Received: k={k!r}.")
    rows = F.normalize(W_dec.detach().float(), dim=-1)  # a row of zeros has cosine 0 with all
    chosen = torch.arange(d_sae) if latents is None else torch.tensor(list(latents), dtype=torch.long)
    found: list[tuple[Tensor, Tensor]] = []
    for part in chosen.to(rows.device).split(ROWS_AT_ONCE):
        cosines = rows[part] @ rows.T  # (part, d_sae)
        cosines[torch.arange(len(part), device=part.device), part] = -torch.inf
        values, places = cosines.topk(k, dim=-1)
        found.append((places.cpu(), values.cpu()))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))
