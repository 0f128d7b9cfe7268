"""SEA, "Spectral editing of activations for large language model alignment"
(https://huggingface.co/papers/2405.09719): keep what varies with positive states, take out what varies with negative
ones.

    projections = spectral_projections(neutral, positive, negative)
    edited = projections.edit(hidden)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SpectralProjections(NamedTuple):
    """positive: (d, k), directions that are kept. negative: (d, m), directions that are taken out."""

    positive: Tensor
    negative: Tensor

    def edit(self, hidden: Tensor) -> Tensor:
        """h' = P h + (I - N) h, brought to the length of h; P and N project onto both sides' directions.

        Args:
            hidden: (..., d).

        Returns:
            (..., d), dtype and device of `hidden`.
        """
        x = hidden.double()
        positive, negative = (side.to(x) for side in self)
        edited = (x @ positive) @ positive.T + x - (x @ negative) @ negative.T
        length, edited_length = (one.norm(dim=-1, keepdim=True) for one in (x, edited))
        return (edited * (length / edited_length.clamp(min=torch.finfo(x.dtype).tiny))).to(hidden.dtype)


def spectral_projections(
    neutral: Tensor, positive: Tensor, negative: Tensor, *, share: float = 0.998
) -> SpectralProjections:
    """Directions of the neutral states that covary most with positive and with negative states of the same texts.

    U S V^T = X^T Y / n, of which the first k columns of U are taken: the fewest that hold `share` of the sum of s_i^2

    Section 3 of the paper, linear; states are not centred. The share and its squares are those of the authors' code
    (https://github.com/yfqiu-nlp/sea-llm) for truthfulness.

    Args:
        neutral, positive, negative: (n, d) each, row by row of the same text, such as of a prompt alone, with a wanted
            and with an unwanted answer.

    Raises:
        ValueError: shapes differ, a value is not finite, or `share` is not in (0, 1].
    """
    shapes = [tuple(states.shape) for states in (neutral, positive, negative)]
    finite = all(bool(states.isfinite().all()) for states in (neutral, positive, negative))
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or not finite:
        raise ValueError(f"Expected finite states of one shape (n, d). Received: {shapes}, finite: {finite}.")
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1]. Received: share={share!r}.")
    return SpectralProjections(*(_shared_directions(neutral, one, share) for one in (positive, negative)))


def _shared_directions(x: Tensor, y: Tensor, share: float) -> Tensor:
    # X^T Y = Q_x (R_x R_y^T) Q_y^T: the decomposition of a matrix of min(n, d) rows is that of all d.
    (q_x, r_x), (_, r_y) = (torch.linalg.qr(states.double().T) for states in (x, y))
    u, s, _ = torch.linalg.svd(r_x @ r_y.T)
    held = s.square().cumsum(0) / s.square().sum()
    return q_x @ u[:, : min(len(s), int((held < share - 1e-12).sum()) + 1)]
