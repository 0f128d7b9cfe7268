"""How well a score separates texts that have a concept from texts that do not."""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the receiver operating characteristic: P(score of a positive > score of a negative), ties count half.

    From the rank sum of the positives (Mann and Whitney 1947, https://doi.org/10.1214/aoms/1177730491), tied scores
    sharing the mean of their ranks: U = R - P (P + 1) / 2, AUROC = U / (P N).

    Args:
        scores: (n,), finite; higher means more of the concept.
        labels: (n,), 1 or True for positives, 0 or False for negatives; both must occur.

    Returns:
        A number in [0, 1]; 0.5 is chance.

    Raises:
        ValueError: shapes differ, a score is not finite, a label is neither 0 nor 1, or one class is missing.
    """
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"`scores` and `labels` must be of one shape (n,). "
            f"Received: scores {tuple(scores.shape)}, labels {tuple(labels.shape)}."
        )
    scores, labels = scores.detach().cpu().double(), labels.detach().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"`scores` must be finite. Received: {int((~scores.isfinite()).sum())} that are not.")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"`labels` must be 0 or 1. Received: {sorted(set(labels.tolist()))[:5]}.")
    positive = labels.bool()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        raise ValueError(f"Both classes must occur. Received: {n_positive} positive, {n_negative} negative.")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # rank, from 1, of the last member of each group of ties
    ranks = (last - (counts - 1) / 2)[place]
    u = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(u / (n_positive * n_negative))


def mean_by_text(values: Tensor, text_index: Tensor, n_texts: int) -> Tensor:
    """Mean over each text's tokens.

    Args:
        values: (n_tokens,) or (n_tokens, d).
        text_index: (n_tokens,) int64, the text of each token.
        n_texts: number of texts.

    Returns:
        means, (n_texts,) or (n_texts, d), float32.

    Raises:
        ValueError: a text has no token.
    """
    counts = torch.bincount(text_index, minlength=n_texts)
    if bool((counts == 0).any()):
        raise ValueError(f"Every text needs a token. Received: {int((counts == 0).sum())} texts without one.")
    sums = torch.zeros(n_texts, *values.shape[1:], device=values.device)
    sums.index_add_(0, text_index, values.float())
    return sums / counts.view(-1, *[1] * (values.ndim - 1))
