"""What penalties on features cost, token by token: functions of the SAE, to be run inside its `forward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .feature_penalty import BoundPenalty
from .sae_mathematics import SaeMathematics, without_gradients


@dataclass(frozen=True, eq=False)
class PenaltyOfCall:
    """A penalty in one forward pass.

    number: its place among the model's. reference: (batch, seq, d_in), what the SAE reads in the reference model; None
    for goals without one.
    """

    number: int
    bound: BoundPenalty
    reference: Tensor | None = None


def penalty_costs(sae: SaeMathematics, x: Tensor, penalties: Sequence[PenaltyOfCall]) -> dict[int, Tensor]:
    """Number of each penalty -> its cost at each token, (batch, seq), with a gradient for `x` alone.

    Args:
        x: (batch, seq, d_in), what the SAE reads, in its dtype.
    """
    frozen = without_gradients(sae)
    return {one.number: token_costs(frozen, x, one) for one in penalties}


def token_costs(sae: SaeMathematics, x: Tensor, one: PenaltyOfCall) -> Tensor:
    """`sum_i w_i c[t, i]^power`, (batch, seq); see `FeaturePenalty`."""
    bound, penalty = one.bound, one.bound.penalty
    features = torch.tensor(bound.features, device=x.device)
    values = penalised_values(sae, x, features, penalty.of)  # (batch, seq, m)
    if penalty.goal == "reference":
        if one.reference is None:
            raise RuntimeError("A penalty towards a reference was run without the reference's states.")
        with torch.no_grad():
            goal = penalised_values(sae, one.reference.to(x), features, penalty.of)
        costs = (values - goal).abs()
    elif penalty.goal == "zero":
        costs = values.abs()
    else:
        margins = values.new_tensor(bound.margins)
        costs = torch.relu(values - margins if penalty.goal == "below" else margins - values)
    if penalty.power == 2:
        costs = costs.square()
    return costs @ costs.new_tensor(bound.weights)


def penalised_values(sae: SaeMathematics, x: Tensor, features: Tensor, of: str) -> Tensor:
    """v, (..., m), of hidden states (..., d_in) and latents (m,): only their encoder columns are used, unless the
    activation selects among all latents (top-k)."""
    normalized = sae.normalize(x)
    if of == "pre_activation":
        return sae.pre_acts_of(normalized, features)[0]
    latents = sae.latents_of(normalized, features)
    if of == "activation":
        return latents
    written = latents * sae.W_dec[features].norm(dim=-1)
    if normalized.scale is not None:
        written = written * normalized.scale
    return written / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
