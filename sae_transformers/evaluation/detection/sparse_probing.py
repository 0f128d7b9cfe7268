"""k-sparse probing: how well a few latents together tell texts with a concept from texts without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...latents.optional_packages import needs
from ...latents.sparse_codes import SparseCodes
from .metrics import LinearProbe, code_aurocs

CHOICES = ("mean_difference", "auroc")


class SparseProbe(NamedTuple):
    """latents: (k,) int64, the first the best. probe: logistic regression on their columns."""

    latents: Tensor
    probe: LinearProbe

    def score(self, codes: SparseCodes) -> Tensor:
        """Log-odds of the concept for each row, (n,) float32."""
        return self.probe.score(codes.columns(self.latents))


def rank_latents(codes: SparseCodes, labels: Tensor, by: str = "mean_difference") -> Tensor:
    """Latents that are active in some row, those that tell the labels apart best first, (m,) int64.

    `mean_difference`: by |mean with label 1 - mean with label 0|, as SAEBench's sparse probing chooses
    (https://huggingface.co/papers/2503.09532). sae-probes (https://huggingface.co/papers/2502.16681) does too, after
    each latent was divided by the mean of its activations.
    `auroc`: by |AUROC - 1/2|, which does not depend on how large a latent's activations are. Ties by number.

    Args:
        codes: (n, d_sae), of training rows only.
        labels: (n,), 0 or 1; both must occur.

    Raises:
        ValueError: an unknown `by`, or a class that is missing.
    """
    if by not in CHOICES:
        raise ValueError(f"`by` must be one of {', '.join(CHOICES)}. Received: by={by!r}.")
    positive = labels.bool().cpu()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if len(labels) != codes.n_rows or not n_positive or not n_negative:
        raise ValueError(
            f"Expected a label for each of {codes.n_rows} rows, and both labels. "
            f"Received: {n_positive} of label 1, {n_negative} of label 0."
        )
    if by == "auroc":
        strength = (code_aurocs(codes, labels) - 0.5).abs()
    else:
        weights = torch.where(positive, 1 / n_positive, -1 / n_negative)
        strength = codes.sums(weights).abs()
    live = codes.live()
    return live[strength[live].argsort(descending=True, stable=True)]


def fit_sparse_probe(codes: SparseCodes, labels: Tensor, latents: Sequence[int] | Tensor) -> SparseProbe:
    """Logistic regression on the standardised columns of some latents, with an L2 penalty of C = 1.

    "Finding Neurons in a Haystack: Case Studies with Sparse Probing" (https://huggingface.co/papers/2305.01610).

    Args:
        codes: (n, d_sae), of training rows.
        labels: (n,), 0 or 1; both must occur.
        latents: (k,), such as the first k of `rank_latents`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no latent, or a class is missing.
    """
    with needs("A sparse probe", "scikit-learn", "evaluation"):
        from sklearn.linear_model import LogisticRegression
    chosen = torch.as_tensor(latents, dtype=torch.long)
    if chosen.ndim != 1 or not len(chosen) or len(labels) != codes.n_rows:
        raise ValueError(
            f"Expected latents (k,), one or more, and a label for each of {codes.n_rows} rows. "
            f"Received: latents of shape {tuple(chosen.shape)}, {len(labels)} labels."
        )
    columns = codes.columns(chosen)
    mean, scale = columns.mean(0), columns.std(0)
    scale = scale.where(scale > 0, 1.0)
    fit = LogisticRegression(max_iter=1000).fit(((columns - mean) / scale).numpy(), labels.cpu().numpy())
    weight = torch.from_numpy(fit.coef_[0]) / scale
    bias = torch.tensor(fit.intercept_[0]) - weight @ mean
    return SparseProbe(chosen, LinearProbe(weight.float(), bias.float()))
