"""Top-k latents from scores in bfloat16: what choosing costs, and whether any latent differs.

    sae-transformers harvest MODEL texts.txt --hook-point layers.14.resid_post --dtype float32 --out states
    sae-transformers train --config topk --data states --layer 14 --d_sae 9216 --k 32 --out my-sae
    python benchmarks/certified_topk.py --states states --sae my-sae --tokens 1000000

CPU time of the process on one thread, in turn, to the bare float32 product into memory that is there; minima and
medians. The latents of every token are then compared with those of the float32 product. Two float32
products differ where two pre-activations lie closer than their rounding, so each difference is looked at in float64: a
mismatch is a latent left out that is larger than one chosen by more than what rounding allows. States of which there
are too few are used again with 5 % of noise. Without `--states` states and encoder are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sae_transformers import SparseAutoencoder
from sae_transformers.training.sae.certified import CertifiedTopK, _candidates, _Rounded, pays
from sae_transformers.training.sae.dataset import HiddenStateShards
from sae_transformers.training.sae.latent_selection import choose, top_k_of

BATCH = 2048
OUTLIERS = 20  # times the median norm: what training leaves out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states")
    parser.add_argument("--sae")
    parser.add_argument("--shape", type=int, nargs=3, default=(576, 9216, 32), metavar=("D_IN", "D_SAE", "K"))
    parser.add_argument("--tokens", type=int, default=100 * BATCH)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    states, W_enc, bias, k = given(args.states, args.sae) if args.states else made(*args.shape)
    print_costs(states, W_enc, bias, k, args.rounds)
    print_differences(states, W_enc, bias, k, args.tokens)


def given(states: str, name: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Normalised hidden states, encoder stored by latent, bias and k of a trained SAE."""
    sae = SparseAutoencoder.from_pretrained(name)
    data = HiddenStateShards(states, [sae.config.read_at])
    x = data.__getitems__(torch.arange(sum(data.sizes)))[sae.config.read_at].float()
    norms = x.norm(dim=-1)
    x = sae.normalize(x[norms < OUTLIERS * norms.median()]).x
    if sae.config.apply_b_dec_to_input:
        x = x - sae.b_dec
    assert sae.config.k is not None, "a top-k SAE is compared"
    return x.detach(), sae.W_enc.detach().T.contiguous().T, sae.b_enc.detach(), sae.config.k


def made(d_in: int, d_sae: int, k: int) -> tuple[Tensor, Tensor, Tensor, int]:
    encoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=-1).T
    return torch.randn(8 * BATCH, d_in), encoder, torch.zeros(d_sae), k


def print_costs(states: Tensor, W_enc: Tensor, bias: Tensor, k: int, rounds: int) -> None:
    x = states[torch.randperm(len(states))[:BATCH]]
    out = torch.empty(len(x), W_enc.shape[1])
    encoder = _Rounded(W_enc, bias)
    ways: dict[str, Callable[[], object]] = {
        "float32 product": lambda: torch.mm(x, W_enc, out=out),
        "bfloat16 product": lambda: encoder.scores(x),
        "choose by float32": lambda: choose(x, W_enc, bias, top_k_of(k)),
        "choose by bfloat16, certified": lambda: CertifiedTopK().choose(x, W_enc, bias, k),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, work in ways.items():
            started = time.process_time()
            work()
            if turn:  # the first one warms up
                times[name].append(time.process_time() - started)
    table = Table("", "ms, least", "to the float32 product: minima / medians")
    floor = times["float32 product"]
    for name, spent in times.items():
        table.add_row(
            name, f"{min(spent) * 1e3:.0f}", f"{min(spent) / min(floor):.2f} / {median(spent) / median(floor):.2f}"
        )
    Console(width=100).print(table)
    counts = torch.cat([_candidates(part, encoder, k)[0].offsets.diff() for part in x.split(256)]).double()
    certain = counts[counts > 0]
    print(
        f"{len(x)} tokens, {W_enc.shape[0]} -> {W_enc.shape[1]}, k {k}: {certain.mean():.0f} candidates a token, 99 % "
        f"have {certain.quantile(0.99):.0f} or fewer; `auto` takes bfloat16 here: {pays(*W_enc.shape)}"
    )


def print_differences(states: Tensor, W_enc: Tensor, bias: Tensor, k: int, n_tokens: int) -> None:
    chooser = CertifiedTopK()
    seen = differ = mismatches = 0
    norm = W_enc.norm(dim=0).max().double()
    for x in batches(states, n_tokens):
        own = chooser.choose(x, W_enc, bias, k)[0].latents.view(len(x), k).sort().values
        float32 = choose(x, W_enc, bias, top_k_of(k))[0].latents.view(len(x), k).sort().values
        rows = (own != float32).any(1)
        seen, differ = seen + len(x), differ + int(rows.sum())
        if rows.any():
            true = x[rows].double() @ W_enc.double() + bias.double()
            lowest = true.gather(1, own[rows]).amin(1)
            left_out = true.scatter(1, own[rows], -torch.inf).amax(1)
            rounding = 2 * x.shape[1] * 2.0**-24 * x[rows].double().norm(dim=-1) * norm
            mismatches += int((left_out > lowest + rounding).sum())
    print(
        f"{seen:,} tokens: {1 - chooser.n_uncertified / seen:.4%} certified; latents differ from the float32 "
        f"product's on {differ}, by more than rounding on {mismatches}"
    )


def batches(states: Tensor, n_tokens: int) -> Iterator[Tensor]:
    first = True
    while n_tokens > 0:
        for x in states[torch.randperm(len(states))].split(BATCH):
            noise = 0.0 if first else 0.05 * x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5
            yield (x + noise * torch.randn_like(x))[:n_tokens]
            n_tokens -= len(x)
            if n_tokens <= 0:
                return
        first = False


if __name__ == "__main__":
    main()
