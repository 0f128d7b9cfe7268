"""Losses of an SAE, one function per equation, for each token; training, models and evaluation use these same ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalized_mse(target: Tensor, output: Tensor) -> Tensor:
    """`mean((output - target)^2) / mean(target^2)` over the width.

    Used by SCAR (https://huggingface.co/papers/2411.07122), SelfReg (https://huggingface.co/papers/2502.14133) and
    "Scaling and evaluating sparse autoencoders" (https://huggingface.co/papers/2406.04093). A target of zeros that is
    met counts 0.

    Args:
        target, output: (..., d).

    Returns:
        (...), 0 or more; 1 for an output of zeros.
    """
    smallest = max(torch.finfo(target.dtype).tiny, torch.finfo(torch.float32).tiny)
    return (output - target).square().mean(-1) / target.square().mean(-1).clamp(min=smallest)


def concept_losses(pre_acts: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of pre-activations as logits; 0, with no gradient, where a label is unknown.

    Args:
        pre_acts: (..., n_concepts).
        labels: (..., n_concepts), 0 to 1, or -100 (any negative number) for unknown.

    Returns:
        (..., n_concepts).
    """
    known = labels >= 0
    goal = torch.where(known, labels, 0.0).to(pre_acts)
    loss = F.binary_cross_entropy_with_logits(pre_acts, goal, reduction="none")
    return torch.where(known, loss, 0.0)
