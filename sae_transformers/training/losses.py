"""Training objectives of published systems, one function an equation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling import SparseAutoencoder


def scar_loss(
    sae: SparseAutoencoder, hidden: Tensor, labels: Tensor, *, scaling: float = 1.0, legacy: bool = False
) -> Tensor:
    """Sparse conditioned autoencoder: `mean_i(L2_i + w_i * BCE_i)` with w = `scaling` on positive tokens, else 1.

    L2 is the normalised MSE; BCE that of the pre-activation of each concept latent, so it has a gradient where the
    latent is not among the top k. "SCAR: sparse conditioned autoencoders for concept detection and steering in LLMs"
    (https://huggingface.co/papers/2411.07122).

    Args:
        sae: with one concept.
        hidden: (n_tokens, d_in).
        labels: (n_tokens,), 1 where the concept is present, 0 where absent, negative where unknown.
        scaling: weight of positive tokens. 0 is the unconditioned objective: no BCE at all.
        legacy: as the published code computes it: `mean_i w_i * (L2_i + BCE_i)`, since its gradient hook scales both
            terms in place, and unknown labels count as absent.

    Returns:
        loss, ().

    Raises:
        ValueError: the SAE has not exactly one concept.
    """
    if len(sae.config.concepts) != 1:
        raise ValueError(f"`sae` must have one concept. Received: concepts={sae.config.concepts!r}.")
    known = torch.where(labels < 0, 0 if legacy else -100, labels)
    terms = sae.losses(hidden, known[:, None], reduction="none")
    if scaling == 0:
        return terms["reconstruction"].mean()
    weights = torch.where(labels > 0, scaling, 1.0).to(hidden)
    if legacy:
        return (weights * (terms["reconstruction"] + terms["conditioning"])).mean()
    return (terms["reconstruction"] + weights * terms["conditioning"]).mean()
