"""Bootstrap intervals of numbers that are sums over texts: every number of a suite is resampled with the same texts,
so that differences between methods are paired."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .results import Measurement

BOOTSTRAP = "bootstrap over texts"


def resample_counts(n: int, resamples: int = 1000, seed: int = 0) -> Tensor:
    """How often each of n rows is drawn in each resample with replacement, (resamples, n) float64.

    `counts @ values` are the sums of all resamples at once (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    Raises:
        ValueError: no rows, or no resamples.
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"Expected rows and resamples, 1 or more. Received: n={n!r}, resamples={resamples!r}.")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(resamples, n, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    for row in counts:
        row.index_add_(0, torch.randint(n, (n,), generator=generator), ones)
    return counts


def percentiles(found: Tensor, level: float = 0.95) -> tuple[float | None, float | None]:
    """Ends of the interval that holds `level` of the resamples' numbers (resamples,); nan ones do not count.

    Returns:
        low and high; None twice where every number is nan.
    """
    known = found[~found.isnan()].double()
    if not len(known):
        return None, None
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = known.quantile(ends).tolist()
    return low, high


def measured(
    metric: str, value: float | Tensor, method: str, drawn: Tensor, *, interval: str = BOOTSTRAP, **facts: Any
) -> Measurement:
    """A number with the interval of what it is in each resample, (resamples,); facts: of `Measurement`."""
    low, high = percentiles(drawn)
    return Measurement(metric, float(value), method, low, high, interval, **facts)


def weighted_aurocs(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """AUROC of resampled rows, (resamples,) float64; nan where a resample has only one class.

    Equal to `detection.auroc` of the rows repeated as often as `counts` says.

    Args:
        scores: (n,), finite.
        labels: (n,), 0 or 1.
        counts: (resamples, n), of `resample_counts`.
    """
    _, place = torch.unique(scores.double(), return_inverse=True)
    positive = labels.bool()
    groups = torch.zeros(len(counts), int(place.max()) + 1, dtype=torch.float64)
    negatives = groups.index_add(1, place[~positive], counts[:, ~positive])
    wins = (negatives.cumsum(1) - negatives / 2)[:, place[positive]]  # negatives below, ties half
    pairs = counts[:, positive].sum(1) * negatives.sum(1)
    return torch.where(pairs > 0, (counts[:, positive] * wins).sum(1) / pairs, torch.nan)


def weighted_f1(predicted: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """F1 of class 1 of resampled rows, (resamples,) float64; 0 where it is neither predicted nor there.

    Args:
        predicted, labels: (n,), 0 or 1.
        counts: (resamples, n).
    """
    predicted, labels = predicted.double(), labels.double()
    return 2 * (counts @ (predicted * labels)) / (counts @ (predicted + labels)).clamp(min=1)
