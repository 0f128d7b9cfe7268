"""DiffMean: the difference of two means as a direction."""

from __future__ import annotations

import torch
from torch import Tensor


def fit_diffmean(hidden: Tensor, labels: Tensor) -> Tensor:
    """`mean(hidden | label 1) - mean(hidden | label 0)`: the simplest detector and steering vector.

    Score a hidden state by its dot product with the direction. A strong baseline on AxBench
    (https://huggingface.co/papers/2501.17148, section 3.2).

    Args:
        hidden: (n, d), any float dtype; a row is a token or a text.
        labels: (n,), 1 where the concept is present, 0 where absent; both must occur.

    Returns:
        direction, (d,), float32, not normalised.

    Raises:
        ValueError: shapes do not fit, a label is neither 0 nor 1, or one class is missing.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"Expected `hidden` (n, d) and `labels` (n,). "
            f"Received: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}."
        )
    present, absent = labels == 1, labels == 0
    if not bool((present | absent).all()) or not bool(present.any()) or not bool(absent.any()):
        received = sorted(torch.unique(labels).tolist())[:5]
        raise ValueError(f"`labels` must be 0 or 1, and both must occur. Received: {received}.")
    return hidden[present].float().mean(0) - hidden[absent].float().mean(0)
