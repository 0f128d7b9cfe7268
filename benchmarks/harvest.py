"""What a harvest costs: time from token ids to hidden states ready to be stored, against the bare model cut off after
the same layer, in one run on the same batches.

    python benchmarks/harvest.py --layer 14

The bare model has its later layers and final norm removed, no hooks, and its output is thrown away. Each round runs
both in turn, so that a busy neighbour hits both alike; printed are the ratio of the minima over rounds, and the median
over rounds of the ratio within a round. On a CPU the process's own CPU time is taken (with one thread, so that it is
the time a free machine takes), on a GPU the wall clock. `store` adds the tokenizer and the writing of shards, once, by
the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bases import load_base
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from sae_transformers.create_training_data.harvest.store import HarvestSettings, harvest_to_store
from sae_transformers.create_training_data.packages import cache_folder
from sae_transformers.latents.batches import length_batches
from sae_transformers.latents.hidden_states import HiddenStateReader, _padded, kept_positions
from sae_transformers.latents.texts import rows_of_list

GOAL = 1.02
CONVERTED = cache_folder() / "SmolLM2-135M-Instruct-from-Q4_1"  # where the quickstart keeps it


def cut_off(model: Any, layer: int) -> Any:
    """The body of a Llama-like model up to a layer, sharing its weights."""
    body = copy.copy(model.base_model)
    body._modules = dict(body._modules)
    body.layers = body.layers[: layer + 1]
    body.norm = torch.nn.Identity()
    return body


def timed(call: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CONVERTED) if CONVERTED.is_dir() else "random-135m")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--sequences", type=int, default=12, help="of a round")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--mixed", action="store_true", help="lengths from 1/8 of --length on, as unpacked texts have")
    parser.add_argument("--tokens-at-once", type=int, default=1024)
    parser.add_argument("--store-dtype", default="bfloat16")
    parser.add_argument("--dtype", default="float32", help="the model runs in it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    model = load_base(args.model, args.device, getattr(torch, args.dtype))
    place, dtype = f"layers.{args.layer}.resid_post", getattr(torch, args.store_dtype)
    torch.manual_seed(0)
    lengths = torch.full((args.sequences,), args.length)
    if args.mixed:
        lengths = torch.randint(args.length // 8, args.length + 1, (args.sequences,))
    sequences = [torch.randint(10, model.config.vocab_size, (int(n),)) for n in lengths]
    keep = [kept_positions(ids) for ids in sequences]
    n_tokens = int(lengths.sum())

    bare = cut_off(model, args.layer)
    grouped = length_batches([len(s) for s in sequences], args.tokens_at_once)
    batches = [_padded([sequences[i] for i in members]) for members in grouped]
    on_device = [{name: value.to(args.device) for name, value in batch.items()} for batch in batches]
    reader = HiddenStateReader(model, [place])

    @torch.no_grad()
    def forward() -> None:
        for batch in on_device:
            bare(**batch, use_cache=False)

    def read() -> None:
        reader.read(sequences, keep, dtype=dtype, tokens_at_once=args.tokens_at_once)[place].cpu()

    calls = {"bare truncated forward": forward, "harvest": read}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(args.rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            seconds = timed(calls[name], args.device)
            if turn:  # the first round warms up
                times[name].append(seconds)
    table = Table("", "tokens/s", "ratio of minima", "median ratio", "goal")
    reference = times["bare truncated forward"]
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
        goal = f"{GOAL}" if name == "harvest" else ""
        ratio = f"{min(seconds) / min(reference):.3f}"
        table.add_row(name, f"{n_tokens / min(seconds):,.0f}", ratio, f"{median(ratios):.3f}", goal)
    if args.model != "random-135m":
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        source = rows_of_list(tokenizer.batch_decode(sequences))
        settings = HarvestSettings(
            (place,), max_length=args.length, dtype=args.store_dtype, tokens_per_batch=args.tokens_at_once
        )
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            found = harvest_to_store(model, tokenizer, source, settings, Path(folder))
            table.add_row("store", f"{found.n_tokens / (time.perf_counter() - start):,.0f}", "", "", "")
    console.print(
        f"{Path(args.model).name}, layer {args.layer}, {args.device}, {args.dtype}, {args.threads} thread(s), "
        f"{n_tokens} tokens a round, {args.rounds} rounds"
    )
    console.print(table)


if __name__ == "__main__":
    main()
