"""What harvesting and training cost: a model of time, bytes and money, checked against runs on this machine.

    python benchmarks/cost_model.py                 # the table of docs/scaling.md
    python benchmarks/cost_model.py --check         # predictions beside measurements, calibrated on this machine

The model counts two things, floating-point operations of dense products and bytes that pass through memory, and
divides each by what the machine does of it in a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from sae_transformers import SaeTrainer, SaeTrainingArguments, SparseAutoencoder, SparseAutoencoderConfig, TensorTokens
from sae_transformers.latents.hidden_states import HiddenStateReader

FLOAT32 = 4


@dataclass(frozen=True)
class Machine:
    """flops: of dense products a second, as reached. bytes: through memory a second. link: to other devices."""

    flops: float
    bytes: float
    link: float = float("inf")


@dataclass(frozen=True)
class Run:
    """d: width. d_sae, k: of the SAE. batch: tokens of a step on all devices. The rest is the base's: blocks that run,
    weights of a block, tokens of a sequence."""

    d: int
    d_sae: int
    k: int
    batch: int
    layers: int
    block_parameters: int
    length: int = 1024


def harvest_seconds(run: Run, machine: Machine) -> float:
    """A token: 2 FLOPs for each weight of the blocks that run, and attention over the sequence."""
    products = 2 * run.layers * run.block_parameters
    attention = 4 * run.layers * run.d * run.length
    return (products + attention) / machine.flops


def step_seconds(run: Run, machine: Machine, devices: int = 1) -> float:
    """A step: the encoder's product; four passes over the chosen rows; the parameters' way through the optimiser.

    Parameter passes, of 2 d d_sae numbers: gradients are written (1), measured and scaled for clipping (3), projected
    and decoder rows normalised (half of 6), and Adam reads 4 and writes 3.
    """
    tokens = run.batch / devices
    dense = 2 * tokens * run.d * run.d_sae / machine.flops
    chosen = 4 * tokens * run.k * run.d * FLOAT32
    parameters = (1 + 3 + 3 + 7) * 2 * run.d * run.d_sae * FLOAT32
    exchanged = 0 if devices == 1 else 2 * 2 * run.d * run.d_sae * FLOAT32 * (devices - 1) / devices
    return dense + (chosen + parameters) / machine.bytes + exchanged / machine.link


def table_of_costs(console: Console, tokens: float, dollars_per_hour: float) -> None:
    """10^9 tokens of an 8B model's middle layer, on H200s at 40 % of their 989 TFLOP/s and 60 % of 4.8 TB/s."""
    machine = Machine(flops=0.4 * 989e12, bytes=0.6 * 4.8e12, link=300e9)
    block = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # Llama 3.1 8B: q, o; k, v; gate, up, down
    table = Table(
        "d_sae", "GPUs", "harvest h", "train h", "both h", "GPU h", "$",
        title=f"{tokens:.0e} tokens, 16 of 32 blocks of an 8B model, k=64; stored: {tokens * 2 * 4096 / 1e12:.1f} TB",
    )  # fmt: skip
    for d_sae in (32_768, 131_072):
        for devices in (1, 8, 64):
            # Steps of 8192 tokens on one device; more devices share a batch of up to 65,536.
            run = Run(4096, d_sae, 64, min(8192 * devices, 65_536), layers=16, block_parameters=block)
            harvest = tokens * harvest_seconds(run, machine) / devices / 3600
            train = tokens / run.batch * step_seconds(run, machine, devices) / 3600
            hours = (harvest + train) * devices
            values = (harvest, train, harvest + train, hours)
            table.add_row(
                f"{d_sae:,}", str(devices), *(f"{v:.2f}" for v in values), f"{hours * dollars_per_hour:,.0f}"
            )
    console.print(table)


def best_seconds(run: Any, rounds: int = 5) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def this_machine() -> Machine:
    left, right = torch.randn(2048, 1024), torch.randn(1024, 4096)
    flops = 2 * 2048 * 1024 * 4096 / best_seconds(lambda: left @ right)
    big, other = torch.randn(2**25), torch.randn(2**25)
    passes = 3 * FLOAT32 * 2**25 / best_seconds(lambda: big.add_(other))
    return Machine(flops, passes)


def check(console: Console) -> None:
    """Predicted against measured, here. Everything but the machine's two speeds comes from the model above."""
    machine = this_machine()
    console.print(f"This machine: {machine.flops / 1e9:,.0f} GFLOP/s, {machine.bytes / 1e9:,.1f} GB/s.")
    table = Table("what", "predicted s", "measured s", "measured / predicted")
    for d, d_sae, k, batch in ((576, 4608, 32, 2048), (576, 9216, 32, 2048), (1024, 8192, 64, 1024)):
        run = Run(d, d_sae, k, batch, layers=0, block_parameters=0)
        sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=d, d_sae=d_sae, activation="topk", k=k, layer=0))
        data = TensorTokens({"layers.0.resid_post": torch.randn(4 * batch, d)})
        # The difference of two lengths: starting takes time too.
        measured = (seconds_of_steps(sae, data, batch, 24) - seconds_of_steps(sae, data, batch, 4)) / 20
        add_row(table, f"step d={d} d_sae={d_sae:,} k={k} batch={batch:,}", step_seconds(run, machine), measured)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=1000,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    ids = torch.randint(0, 1000, (16, 128))
    keep = list(torch.ones_like(ids, dtype=torch.bool))
    for layer in (3, 11):
        reader = HiddenStateReader(model, [f"layers.{layer}.resid_post"])
        run = Run(576, 0, 0, 0, layers=layer + 1, block_parameters=block, length=128)
        predicted = ids.numel() * harvest_seconds(run, machine)
        measured = best_seconds(lambda r=reader: r.read(list(ids), keep, tokens_at_once=2048))
        add_row(table, f"harvest {ids.numel():,} tokens to layer {layer}", predicted, measured)
    console.print(table)


def seconds_of_steps(sae: SparseAutoencoder, data: TensorTokens, batch: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        args = SaeTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = SaeTrainer(sae, args, data)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def add_row(table: Table, what: str, predicted: float, measured: float) -> None:
    table.add_row(what, f"{predicted:.3f}", f"{measured:.3f}", f"{measured / predicted:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="measure small runs here and compare")
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--dollars-per-hour", type=float, default=3.0, help="for one GPU")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    table_of_costs(console, args.tokens, args.dollars_per_hour)
    if args.check:
        check(console)


if __name__ == "__main__":
    main()
