"""What collecting spans costs beside the encoder alone, and its memory: time from hidden states to the best texts of
each latent, against the bare product with the encoder's weights, in one run on the same blocks.

    python benchmarks/spans.py --tokens 1000000 --d-sae 65536

Hidden states and weights are random and no language model runs: the width is small on purpose, so that what is added
to the product shows. Each block is done by both in turn, so that a busy neighbour hits both alike. On a CPU the
process's own CPU time is taken, on a GPU the wall clock. Random states are the worst case in one way: every latent
is active on half of all tokens. The number of new best texts falls as 1 / texts seen, so the ratio is printed for all
blocks and for the last half of them. Memory is the process's peak after and before, and the state alone.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.create_training_data.spans.top_examples import SpanHeap, add_hidden

TEXTS_OF_BLOCK = 256


def peak_mb(device: str) -> float:
    """Of the process in main memory, or of the GPU's."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(device: str, work: Callable[[], object]) -> float:
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bare(sae: SparseAutoencoder, hidden: torch.Tensor, step: int) -> None:
    for rows in hidden.split(step):
        torch.addmm(sae.b_enc, rows, sae.W_enc)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--d-sae", type=int, default=65536)
    parser.add_argument("--d-in", type=int, default=64)
    parser.add_argument("--top-n", type=int, default=10)
    parser.add_argument("--text-tokens", type=int, default=64, help="Mean; half to one and a half of it.")
    parser.add_argument("--pre-acts-at-once", type=int, default=2**22)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, generator = options.device, torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=options.d_in, d_sae=options.d_sae, activation="relu"))
    sae = sae.to(device)
    heap = SpanHeap(options.d_sae, options.top_n, device=device)
    step = max(1, options.pre_acts_at_once // options.d_sae)
    before = peak_mb(device)
    rows, first, done = [], 0, 0
    while done < options.tokens:
        half = options.text_tokens // 2
        counts = torch.randint(half, 3 * half + 1, (TEXTS_OF_BLOCK,), generator=generator)
        text = (torch.arange(TEXTS_OF_BLOCK) + first).repeat_interleave(counts)
        position = torch.cat([torch.arange(int(n)) for n in counts]).int()
        hidden = torch.randn(len(text), options.d_in, generator=generator).to(device)
        product = timed(device, lambda hidden=hidden: bare(sae, hidden, step))
        whole = timed(
            device,
            lambda hidden=hidden, text=text, position=position: add_hidden(
                heap, sae, hidden, text, position, pre_acts_at_once=options.pre_acts_at_once
            ),
        )
        rows.append((len(text), product, whole))
        first, done = first + TEXTS_OF_BLOCK, done + len(text)
    last = timed(device, heap.settle)
    peak = peak_mb(device)
    table = Table(
        "blocks", "tokens", "product, tokens/s", "spans, tokens/s", "ratio", title=f"{options.d_sae} latents"
    )
    for name, part, extra in (("all", rows, last), ("last half", rows[len(rows) // 2 :], 0.0)):
        n, product, whole = (sum(column) for column in zip(*part, strict=True))
        table.add_row(
            name, f"{n:,}", f"{n / product:,.0f}", f"{n / (whole + extra):,.0f}", f"{(whole + extra) / product:.2f}"
        )
    Console().print(table)
    state = sum(tensor.nbytes for tensor in (heap.score, heap.text, heap.position)) / 2**20
    Console().print(
        f"{first:,} texts; state {state:.0f} MB, {step} tokens at once ({step * options.d_sae * 4 / 2**20:.0f} MB of "
        f"pre-activations); peak memory {peak:,.0f} MB, {peak - before:,.0f} MB more than before."
    )


if __name__ == "__main__":
    main()
