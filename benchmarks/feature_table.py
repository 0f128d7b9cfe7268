"""Statistics and extreme tokens of all features of an SAE: in row blocks as the library does it, from the whole
matrix, and row by row, each in processes of its own.

    python benchmarks/feature_table.py
    python benchmarks/feature_table.py --d-sae 24576 --d-model 768 --vocab 50257       # the original's size

Weights are random: neither way looks at their values. The ways take turns, so that a busy neighbour hits all alike;
times are the processes' own CPU seconds, the least of the rounds. Memory is the peak of a process above what it held
with the weights loaded. The loop does a part of the rows, and its time is scaled up.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from sae_transformers.evaluation.features.table import logit_weights

K = 10


def blocks(W_dec: torch.Tensor, W_U: torch.Tensor) -> torch.Tensor:
    found = logit_weights(W_dec, W_U, top_k=K)
    return torch.stack([found.mean, found.std, found.skewness, found.kurtosis, found.top_weights.sum(-1).double()])


def whole(W_dec: torch.Tensor, W_U: torch.Tensor) -> torch.Tensor:
    """As the formulas say, on the whole matrix."""
    P = W_dec @ W_U
    mean = P.mean(-1, keepdim=True)
    std = (P - mean).square().mean(-1, keepdim=True).sqrt()
    z = (P - mean) / std
    skewness, kurtosis = (z**3).mean(-1), (z**4).mean(-1)
    top, _ = P.topk(K), P.topk(K, largest=False)
    return torch.stack([mean[:, 0], std[:, 0], skewness, kurtosis, top.values.sum(-1)]).double()


def rows(W_dec: torch.Tensor, W_U: torch.Tensor) -> torch.Tensor:
    """A feature at a time, as the original picks its tokens."""
    return torch.cat([whole(row[None], W_U) for row in W_dec], dim=-1)


WAYS = {"blocks": blocks, "whole": whole, "rows": rows}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def child(way: str, d_sae: int, d_model: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W_U = torch.randn(d_model, vocab, generator=generator)
    W_dec = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5
    WAYS[way](W_dec[:1, :8], W_U[:8, : K * 40])  # threads and libraries are there
    before, start, wall = peak_mb(), time.process_time(), time.perf_counter()
    found = WAYS[way](W_dec, W_U)
    told = {"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall, "mb": peak_mb() - before}
    print(json.dumps({**told, "sums": found[:, : min(100, d_sae)].sum(-1).tolist()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--loop-rows", type=int, default=200, help="of the row-by-row way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.d_sae, options.d_model, options.vocab)
        return
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, told in found.items():
            n = min(options.loop_rows, options.d_sae) if way == "rows" else options.d_sae
            size = ["--d-sae", n, "--d-model", options.d_model, "--vocab", options.vocab]
            command = [sys.executable, __file__, "--child", way, *map(str, size)]
            one = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            told.append(
                {**one, "cpu_s": one["cpu_s"] * options.d_sae / n, "wall_s": one["wall_s"] * options.d_sae / n}
            )
    least = {
        way: {name: min(one[name] for one in told) for name in ("cpu_s", "wall_s", "mb")}
        for way, told in found.items()
    }
    first = torch.tensor([found[way][0]["sums"] for way in ("blocks", "whole")])
    table = Table("way", "CPU s", "to blocks", "wall s", "peak MB", "to blocks")
    for way, one in least.items():
        ours = least["blocks"]
        ratios = f"{one['cpu_s'] / ours['cpu_s']:.2f}", f"{one['mb'] / max(1.0, ours['mb']):.1f}"
        table.add_row(way, f"{one['cpu_s']:.2f}", ratios[0], f"{one['wall_s']:.2f}", f"{one['mb']:,.0f}", ratios[1])
    console = Console()
    console.print(table)
    console.print(f"{options.d_sae:,} x {options.vocab:,}, width {options.d_model}; the whole matrix is "
                  f"{options.d_sae * options.vocab * 4 / 2**20:,.0f} MB; largest relative difference of sums "
                  f"{float(((first[0] - first[1]).abs() / first[1].abs().clamp(min=1)).max()):.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
