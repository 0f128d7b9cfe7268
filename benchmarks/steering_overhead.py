"""What steering costs: time of a prefill and of a generated token against the plain base model, in one run.

    python benchmarks/steering_overhead.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Every round runs all cases once, in turn, so that a busy neighbour hits all alike. Printed are the ratio of the minima
over rounds, and the median over rounds of the ratio within a round. On a CPU the process's own CPU time is taken, on a
GPU the wall clock. `--compile` compiles all of them, the base too, whole graphs; tokens then come from a static cache.
The SAE is random: costs do not depend on its weights, except that a JumpReLU threshold sets how many latents are
active.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from bases import load_base
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CompileConfig

from sae_transformers import (
    FeatureEdit,
    Gate,
    SaeForCausalLM,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Steering,
    Strength,
)
from sae_transformers.modeling.base_arguments import cache_of

GOALS = {
    "idle": 1.01, "direction": 1.02, "set 1": 1.04, "set 8": 1.04, "gate on the prompt, shut": 1.01,
    "gate on the prompt, open": 1.02, "gate per token": 1.03,
}  # fmt: skip


def make_sae(width: int, d_sae: int, activation: str, layer: int, k: int) -> SparseAutoencoder:
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(
        d_in=width, d_sae=d_sae, activation=activation, k=k if activation == "topk" else None, layer=layer
    )
    return SparseAutoencoder(config)


def cases(d_sae: int) -> dict[str, dict]:
    """Name of each case -> the options of its calls."""

    def edits(count: int, op: str, value: float, **options) -> dict:
        chosen = [FeatureEdit(0, int(i), op, value) for i in torch.linspace(0, d_sae - 1, count).long()]
        return {"steering": Steering(chosen, **options)}

    return {
        "idle": {"steering": False},
        "direction": edits(1, "direction", 1e-3),
        "set 1": edits(1, "set", 1e-3),
        "set 8": edits(8, "set", 1e-3),
        "set 64": edits(64, "set", 1e-3),
        "encode all": {"steering": False, "output_features": True},
        "replace": edits(1, "set", 1e-3, keep_error=False),
        "gate on the prompt, shut": edits(1, "direction", 1e-3, when=Gate(feature=1, above=1e9, over="prompt")),
        "gate on the prompt, open": edits(1, "direction", 1e-3, when=Gate(feature=1, above=-1e9, over="prompt")),
        "gate per token": edits(1, "direction", 1e-3, when=Gate(feature=1, above=0.0)),
        "direction, 17 tokens excluded": edits(1, "direction", 1e-3, exclude_tokens=range(17)),
        "direction, strength per token": {
            "steering": Steering([FeatureEdit(0, 0, "direction", 1e-3, strength=Strength(feature=1, high=1.0))])
        },
        "direction, decaying": {
            "steering": Steering(
                [FeatureEdit(0, 0, "direction", 1e-3, strength=Strength(decay="exponential", over=20))]
            )
        },
        "erase 1": {"steering": Steering([FeatureEdit(0, 0, "erase")])},
    }


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


@torch.no_grad()
def measure(calls: dict[str, Callable[[], object]], rounds: int, device: str, label: str) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in track(range(rounds), description=label):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(calls[name], device))
    return times


def static_and_compiled(device: str) -> dict:
    """Options of `generate` for a compiled forward pass."""
    config = CompileConfig(fullgraph=True, mode="reduce-overhead" if device == "cuda" else "default")
    config._compile_all_devices = True  # on a CPU, too
    return {"cache_implementation": "static", "compile_config": config}


def decode_steps(model, ids: torch.Tensor, steps: int, options: dict) -> None:
    """Greedy tokens one by one; `output_features` is not an option of `generate`, so that case decodes by hand."""
    if "output_features" not in options:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return
    mask = torch.ones_like(ids)
    out = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **options)
    for _ in range(steps - 1):
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        past = cache_of(out)
        out = model(token, attention_mask=mask, past_key_values=past, use_cache=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-135m", help="id or folder of a causal LM, or random-135m")
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--activations", nargs="+", default=["jumprelu", "topk"])
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--cases", nargs="+", default=list(cases(64)), help="of all that a run without it prints")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    base = load_base(args.model, args.device)
    width = base.config.hidden_size
    ids = torch.randint(10, base.config.vocab_size, (1, args.prefill), device=args.device)
    short = ids[:, :8]
    share = 2 * width * args.d_sae / (2 * sum(p.numel() for p in base.parameters()))
    console.print(
        f"{args.model}, {width} wide, {args.device}, {args.threads} thread(s); {args.d_sae} latents at layer "
        f"{args.layer}"
    )
    console.print(f"the encoder's matmul is {share:.1%} of the model's FLOPs")
    for activation in args.activations:
        # A base of its own for the comparison: hooks of the wrapper would be on a shared one.
        model = SaeForCausalLM.from_base(
            load_base(args.model, args.device), saes=[make_sae(width, args.d_sae, activation, args.layer, args.k)]
        )
        _calibrate(model, ids, args.k)
        chosen = {n: {**c, **_prepared(model, c)} for n, c in cases(args.d_sae).items() if n in args.cases}
        runs = [("base", base, {}), *((name, model, options) for name, options in chosen.items())]
        static = static_and_compiled(args.device) if args.compile else {}
        calls = {m: torch.compile(m, fullgraph=True) if args.compile else m for m in (base, model)}
        prefill = {n: partial(calls[m], ids, use_cache=True, logits_to_keep=1, **o) for n, m, o in runs}
        decode = {n: partial(decode_steps, m, short, args.tokens, {**o, **static}) for n, m, o in runs}
        first = measure(prefill, args.rounds, args.device, f"{activation}: prefill {args.prefill}")
        second = measure(decode, args.rounds, args.device, f"{activation}: {args.tokens} tokens")
        console.print(_table(activation, first, second, args.tokens))


@torch.no_grad()
def _calibrate(model: SaeForCausalLM, ids: torch.Tensor, k: int) -> None:
    """A JumpReLU threshold that leaves about `k` latents active."""
    sae = model.saes[0]
    if hasattr(sae, "threshold"):
        hidden = model(ids, output_sae_inputs=True, stop_at_last_sae=True).sae_inputs[0]
        sae.threshold.fill_(float(sae.encode_pre_acts(hidden).topk(k, dim=-1).values[..., -1].median()))


def _prepared(model: SaeForCausalLM, options: dict) -> dict:
    steering = options["steering"]
    return {"steering": model.prepare_steering(steering) if steering else False}


def _table(activation: str, prefill: dict, decode: dict, tokens: int) -> Table:
    table = Table(title=f"{activation}: against the plain base")
    for column in ("case", "prefill ms", "minima", "median", "token ms", "minima", "median", "goal"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name in prefill:
        goal = f"{GOALS[name]}" if name in GOALS else ""
        table.add_row(name, *_columns(prefill, name, 1), *_columns(decode, name, tokens), goal)
    return table


def _columns(times: dict[str, list[float]], name: str, tokens: int) -> tuple[str, str, str]:
    pairs = [case / base for case, base in zip(times[name], times["base"], strict=True)]
    shortest = min(times[name])
    return f"{1e3 * shortest / tokens:.2f}", f"{shortest / min(times['base']):.3f}", f"{median(pairs):.3f}"


if __name__ == "__main__":
    main()
