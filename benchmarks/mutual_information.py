"""Mutual information of latents and a label: time a column, against scikit-learn in the same run."""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from sklearn.feature_selection import mutual_info_classif

from sae_transformers.training.steering.mutual_information import mutual_information


def columns(kind: str, n_rows: int, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(n_rows, generator=generator) < 0.35).long()
    values = torch.randn(n_rows, n_columns, generator=generator, dtype=torch.float64) + 0.5 * labels[:, None]
    if kind == "sparse":
        on = torch.rand(n_rows, n_columns, generator=generator) < torch.where(labels[:, None] == 1, 0.35, 0.1)
        values = torch.where(on, values.abs(), 0.0)
    return values, labels


def best_of(rounds: int, estimate, values, labels, **options) -> tuple[float, np.ndarray]:
    times, found = [], np.empty(0)
    for _ in range(rounds):
        start = time.perf_counter()
        found = np.asarray(estimate(values, labels, **options))
        times.append(time.perf_counter() - start)
    return min(times), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=7000)
    parser.add_argument("--columns", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for kind in ("dense", "sparse"):
        values, labels = columns(kind, args.rows, args.columns)
        theirs = best_of(args.rounds, mutual_info_classif, values.numpy(), labels.numpy(), random_state=0)
        ours = best_of(args.rounds, mutual_information, values, labels)
        a, b = (1e3 * seconds / args.columns for seconds in (theirs[0], ours[0]))
        apart = np.abs(theirs[1] - ours[1]).max()
        print(f"{kind}: scikit-learn {a:.2f} ms a column, here {b:.2f} ms: {a / b:.1f} times; differ by {apart:.1e}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB")


if __name__ == "__main__":
    main()
