"""How well a score separates texts that have a concept from texts that do not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...latents.optional_packages import needs
from ...latents.sparse_codes import SparseCodes

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse, of logistic regression, tried by cross-validation


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


def code_aurocs(codes: SparseCodes, labels: Tensor, *, latents_at_once: int = 1024) -> Tensor:
    """AUROC of every latent as a score of the rows, (d_sae,) float64; 0.5 for a latent that is never active.

    The best latent of an SAE that was not trained on the labels is `code_aurocs(...).argmax()` on one part of the
    texts; what it is worth shows on another.

    Args:
        codes: (n, d_sae).
        labels: (n,), 0 or 1; both must occur.
        latents_at_once: judged together.
    """
    scores = torch.full((codes.d_sae,), 0.5, dtype=torch.float64)
    for latents in codes.live().split(latents_at_once):
        scores[latents] = _row_aurocs(codes.columns(latents).T.contiguous(), labels)
    return scores


class LinearProbe(NamedTuple):
    """Scores hidden states (..., d) by `hidden @ weight + bias`, the log-odds of the concept.

    weight: (d,) float32. bias: ().
    """

    weight: Tensor
    bias: Tensor

    def score(self, hidden: Tensor) -> Tensor:
        """Log-odds of label 1, (n,), of hidden states (n, d)."""
        return hidden.float() @ self.weight + self.bias


def fit_linear_probe(hidden: Tensor, labels: Tensor, *, seed: int = 0) -> LinearProbe:
    """Logistic regression on standardised hidden states, its penalty chosen by 5-fold cross-validation for AUROC.

    The usual baseline of detection, as on AxBench (https://huggingface.co/papers/2501.17148, section 3.2).

    Args:
        hidden: (n, d), of tokens, or of texts as `mean_by_text` pools them.
        labels: (n,), 0 or 1, two of each or more.
        seed: of the folds.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes do not fit, a value is not finite, or a class has fewer than two members.
    """
    with needs("A linear probe", "scikit-learn", "evaluation"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or not bool(torch.isfinite(hidden).all()):
        raise ValueError(
            f"Expected finite `hidden` (n, d) and `labels` (n,). "
            f"Received: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}."
        )
    members = [int((labels == value).sum()) for value in (0, 1)]
    if sum(members) != len(labels) or min(members) < 2:
        raise ValueError(f"`labels` must be 0 or 1, two or more of each. Received: {members} of {len(labels)}.")
    x = hidden.detach().cpu().double()
    mean, scale = x.mean(0), x.std(0)
    scale = scale.where(scale > 0, 1.0)
    folds = StratifiedKFold(min(5, *members), shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": list(PENALTIES)}, scoring="roc_auc", cv=folds)
    fit = search.fit(((x - mean) / scale).numpy(), labels.cpu().numpy()).best_estimator_
    weight = torch.from_numpy(fit.coef_[0]) / scale
    bias = torch.tensor(fit.intercept_[0]) - weight @ mean
    return LinearProbe(weight.float(), bias.float())


def _row_aurocs(scores: Tensor, labels: Tensor) -> Tensor:
    """`auroc` of each row of (m, n) scores for one set of labels, (m,)."""
    auroc(scores[0], labels)  # checks both
    positive = labels.cpu().bool()
    ordered = scores.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    ranks = (below + up_to + 1).double() / 2  # ties share the mean of their ranks, from 1
    n_positive = int(positive.sum())
    u = ranks[:, positive].sum(-1) - n_positive * (n_positive + 1) / 2
    return u / (n_positive * (len(labels) - n_positive))
