"""Taking a concept out of what an SAE does not reconstruct: op `erase`.

    h' = decode(z') + (1 - P) (h - decode(z)),    z' = z with the erased latents at 0

P projects onto the span of the decoder rows of all latents that are erased at a token. Ablating alone keeps the error
whole, and 95.8 % of what was suppressed could be brought back (https://huggingface.co/papers/2606.18322). The biases
of the decoder, and what other latents write along these rows, stay: they are part of the reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .steering_tables import is_open


class Erasures:
    """What is erased at one SAE.

    Args:
        rows: of each row of the steering the (latent, number of its gate) pairs.

    features: (q,) int64 latents. rows: (R, q) bool, which are whose. gates: (R, q) int64. apart: whether the gates of
    one row differ, so that the span depends on the token.
    """

    def __init__(self, rows: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> None:
        own = [set(row) for row in rows]
        known = sorted(set().union(*own))
        self.features = torch.tensor([feature for feature, _ in known], dtype=torch.long, device=device)
        self.rows = torch.tensor([[pair in row for pair in known] for row in own], device=device)
        self.gates = torch.tensor([[gate for _, gate in known]] * len(rows), dtype=torch.long, device=device)
        self.apart = any(len({gate for _, gate in row}) > 1 for row in rows)

    def component(self, error: Tensor, directions: Tensor, rows: Tensor | None, opened: Tensor | None) -> Tensor:
        """P error, (batch, T, d_out), of `error`'s dtype.

        Args:
            error: (batch, T, d_out), what the SAE does not reconstruct.
            directions: (q, d_out), decoder rows of `features`.
            rows: (batch,) rows of the steering's tables, or None for the only one.
            opened: (batch, T, G + 1) bool, by number of the gate; None where there are none.
        """
        own = (self.rows if rows is None else self.rows[rows]).unsqueeze(1)  # (batch or 1, 1, q)
        inside = None
        if opened is not None:
            here = own & is_open(opened, self.gates, rows)  # (batch, T, q)
            own, inside = (here, None) if self.apart else (own, here.any(-1, keepdim=True))
        # In double precision, so that rows which nearly coincide span what they do; MPS has none.
        wide = error.dtype if error.device.type == "mps" else torch.float64
        unit = directions.to(wide)
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        gram = (unit @ unit.T) * (own.unsqueeze(-1) & own.unsqueeze(-2))  # (batch or 1, T or 1, q, q)
        inverse = torch.linalg.pinv(gram, rtol=torch.finfo(wide).eps ** 0.75, hermitian=True)
        along = (error.to(wide) @ unit.T).unsqueeze(-2)  # (batch, T, 1, q)
        found = ((along @ inverse).squeeze(-2) @ unit).to(error.dtype)
        return found if inside is None else torch.where(inside, found, 0.0)
