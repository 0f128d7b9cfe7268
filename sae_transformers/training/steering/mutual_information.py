"""Mutual information of latents and a label: scikit-learn's nearest-neighbour estimator for many columns at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...latents.sparse_codes import SparseCodes

NOISE = 1e-10  # in standard deviations, as scikit-learn adds it to tell equal values apart
VALUES_AT_ONCE = 1 << 16  # what stays in a core's cache
COLUMNS_AT_ONCE = 256


def mutual_information(
    values: Tensor,
    labels: Tensor,
    *,
    n_neighbors: int = 3,
    seed: int = 0,
    numbers: Tensor | None = None,
) -> Tensor:
    """Mutual information of each column and a discrete label, in nats, from distances to nearest neighbours.

    MI = max(0, psi(N) + <psi(k)> - <psi(n_y)> - <psi(m)>)

    of "Mutual information between discrete and continuous data sets" (https://doi.org/10.1371/journal.pone.0087357,
    equation 2): n_y rows share the label of a row, k = min(n_neighbors, n_y - 1), and m rows of any label, itself
    included, are nearer than the k-th nearest of its own label. A column is divided by its standard deviation and
    gets noise of 1e-10. Labels with a single row are left out. This is what scikit-learn's `mutual_info_classif`
    computes for continuous features; a column of different values has the same result here to rounding, whatever
    the seed. Where many values are equal (a latent that is mostly off), the noise decides and the result depends on
    the seed, here as there.

    Args:
        values: (n, m), finite.
        labels: (n,), any integers.
        n_neighbors: k, at least 1.
        seed: of the noise.
        numbers: (m,), of the columns: noise depends on the seed, the row and this number alone, so that a column
            has one result however columns are put together. By default 0 to m - 1.

    Returns:
        (m,) float64.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or fewer than two labels have two rows.
    """
    if n_neighbors < 1:
        raise ValueError(f"`n_neighbors` must be at least 1. Received: n_neighbors={n_neighbors!r}.")
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ValueError(
            f"Expected `values` (n, m) and `labels` (n,). "
            f"Received: values {tuple(values.shape)}, labels {tuple(labels.shape)}."
        )
    x = np.ascontiguousarray(values.detach().cpu().double().numpy().T)  # (m, n)
    if not np.isfinite(x).all():
        raise ValueError(f"`values` must be finite. Received: {int((~np.isfinite(x)).sum())} that are not.")
    y = labels.cpu().numpy()
    kinds, sizes = np.unique(y, return_counts=True)
    kinds, sizes = kinds[sizes > 1], sizes[sizes > 1]
    if len(kinds) < 2:
        raise ValueError(f"Two labels need two rows or more each. Received: {len(kinds)} such.")
    number = np.arange(len(x)) if numbers is None else numbers.cpu().numpy()
    step = max(1, VALUES_AT_ONCE // x.shape[1])
    blocks = [slice(i, i + step) for i in range(0, len(x), step)]
    found = [_of_columns(x[block], number[block], y, kinds, sizes, n_neighbors, seed) for block in blocks]
    return torch.from_numpy(np.concatenate([np.empty(0), *found]))


def _of_columns(
    x: np.ndarray, number: np.ndarray, y: np.ndarray, kinds: np.ndarray, sizes: np.ndarray, k_most: int, seed: int
) -> np.ndarray:
    """`mutual_information` of a few columns (m, n), (m,)."""
    x = _scaled(x)
    tied = np.flatnonzero((np.diff(np.sort(x, axis=1), axis=1) == 0).any(1))  # noise matters to equal values alone
    if len(tied):
        noise = NOISE * np.maximum(1, np.abs(x[tied]).mean(1))[:, None]
        x[tied] += noise * _noise(number[tied], x.shape[1], seed)
    n = int(sizes.sum())
    psi = torch.digamma(torch.arange(1, n + 1, dtype=torch.float64)).numpy()  # psi[i] is psi(i + 1)
    total = np.full(len(x), psi[n - 1])
    for kind, size in zip(kinds, sizes, strict=True):
        own = np.sort(x[:, y == kind], axis=1)
        others = np.sort(x[:, np.isin(y, kinds[kinds != kind])], axis=1)
        k = min(k_most, int(size) - 1)
        radius = _distance_to_neighbor(own, k)
        near = k + _count_between(others, own - radius, own + radius)  # k of its own: itself, and all but the k-th
        total += size / n * (psi[k - 1] - psi[size - 1]) - psi[near - 1].sum(1) / n
    return np.maximum(0.0, total)


def code_mutual_information(
    codes: SparseCodes,
    labels: Tensor,
    *,
    n_neighbors: int = 3,
    seed: int = 0,
    dead: bool = False,
    progress: bool = False,
) -> Tensor:
    """`mutual_information` of every latent, (d_sae,) float64.

    Args:
        codes: (n, d_sae).
        labels: (n,).
        dead: estimate latents that are never active too, as SpARE's code does: what comes out is noise, above 0 for
            about half of them. By default they get 0, which is what a constant tells.
        progress: show a progress bar.
    """
    result = torch.zeros(codes.d_sae, dtype=torch.float64)
    latents = torch.arange(codes.d_sae) if dead else codes.live()
    for block in tqdm(latents.split(COLUMNS_AT_ONCE), disable=not progress, desc="mutual information", unit="block"):
        found = mutual_information(codes.columns(block), labels, n_neighbors=n_neighbors, seed=seed, numbers=block)
        result[block] = found
    return result


def _scaled(x: np.ndarray) -> np.ndarray:
    """Rows divided by their standard deviation; constant ones stay."""
    deviation = x.std(1)
    deviation[deviation < 10 * np.finfo(float).eps] = 1.0
    return x / deviation[:, None]


def _noise(numbers: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Standard normal numbers (m, n), each from the seed, the column's number and the row alone."""
    with np.errstate(over="ignore"):
        column = _mixed(numbers.astype(np.uint64) + _mixed(np.array([seed], dtype=np.uint64)))[:, None]
        bits = _mixed(column + np.arange(n, dtype=np.uint64))
    high, low = (bits >> np.uint64(32)).astype(np.float64), (bits & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.sqrt(-2 * np.log((high + 1) / 2**32)) * np.cos(low * (2 * np.pi / 2**32))  # Box and Muller


def _mixed(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (https://doi.org/10.1145/2660193.2660195): random bits of different numbers."""
    bits = (bits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _distance_to_neighbor(ordered: np.ndarray, k: int) -> np.ndarray:
    """Distance of each value to its k-th nearest in its row, (m, n), of ascending rows.

    The k nearest and the value itself are k + 1 neighbours in a row; of the k + 1 windows that hold it the best
    counts.
    """
    n = ordered.shape[1]
    best = np.full_like(ordered, np.inf)
    for first in range(-k, 1):  # the window of value i is [i + first, i + first + k]
        low, high = max(0, -first), n - max(0, first + k)  # values whose window is inside
        here = ordered[:, low:high]
        far = np.maximum(
            here - ordered[:, low + first : high + first], ordered[:, low + first + k : high + first + k] - here
        )
        np.minimum(best[:, low:high], far, out=best[:, low:high])
    return best


def _count_between(ordered: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many of each row of `ordered` (m, n) lie in each ]low, high[ (m, c) of that row: (m, c) int64."""
    return np.stack(
        [
            np.searchsorted(row, above) - np.searchsorted(row, below, side="right")
            for row, below, above in zip(ordered, low, high, strict=True)
        ]
    )
