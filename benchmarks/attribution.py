"""What gradient x latent costs: CPU time against one forward and backward pass of the plain base, in one run.

    python benchmarks/attribution.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The baseline is the base's forward pass and the gradient of the last token's logit by the input embeddings: a backward
pass through every layer, without parameters. Every round runs all cases once, in turn. Printed are the ratio of the
minima over rounds, and the median over rounds of the ratio within a round; on a GPU the wall clock. SAEs are random
top-k ones at evenly spaced blocks, from the first on: costs do not depend on their weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from bases import load_base
from rich.console import Console
from rich.table import Table

from sae_transformers import SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.evaluation.attribution.effects import gradient_effects
from sae_transformers.evaluation.attribution.targets import Target

GOAL = 3.0


def with_saes(base, count: int, d_sae: int, k: int) -> SaeForCausalLM:
    width, depth = base.config.hidden_size, base.config.num_hidden_layers
    torch.manual_seed(0)
    saes = [
        SparseAutoencoder(SparseAutoencoderConfig(d_in=width, d_sae=d_sae, activation="topk", k=k, layer=layer))
        for layer in torch.linspace(0, depth - 2, count).long().tolist()
    ]
    return SaeForCausalLM.from_base(base, saes=saes).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="random-135m")
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", default="16,128", help="Lengths of the text.")
    parser.add_argument("--saes", default="1,2,4", help="Numbers of SAEs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    base = load_base(args.model, args.device).requires_grad_(False)
    models = {int(count): with_saes(base, int(count), args.d_sae, args.k) for count in args.saes.split(",")}
    for model in models.values():
        model.unwrap()
    console = Console()
    for length in map(int, args.tokens.split(",")):
        ids = torch.randint(3, base.config.vocab_size, (1, length), device=args.device)
        target = Target("logit", ids[0].tolist(), lambda out: out.logits[:, -1, 7], {"logits_to_keep": 1})

        def plain(ids=ids) -> None:
            embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
            out = base(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1)
            torch.autograd.grad(out.logits[0, -1, 7], embeddings)

        def attributed(model, target=target) -> None:
            gradient_effects(model, target, range(len(model.saes)))

        def detached(model, ids=ids) -> None:
            asked = {"output_features": True, "features_require_grad": True}
            out = model(ids, **asked, use_cache=False, logits_to_keep=1)
            torch.autograd.grad(out.logits[0, -1, 7], [one.values for one in out.sae_features])

        cases: dict[str, tuple[SaeForCausalLM | None, Callable]] = {"forward and backward": (None, plain)}
        for count, model in models.items():
            cases[f"gradient x latent, SAEs: {count}"] = (model, attributed)
            cases[f"error detached, SAEs: {count}"] = (model, detached)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.rounds + 1):
            for name, (model, run) in cases.items():
                if model is not None:
                    model.rewrap()
                start = clock()
                run() if model is None else run(model)
                if args.device != "cpu":
                    torch.cuda.synchronize()
                times[name].append(clock() - start)
                if model is not None:
                    model.unwrap()
        first = next(iter(times.values()))[1:]  # the first round warms up
        table = Table(
            "case", "ms", "minima", "median of ratios", "goal", title=f"{length} tokens, d_sae {args.d_sae:,}"
        )
        for name, measured in times.items():
            own = measured[1:]
            ratio, middle = min(own) / min(first), median(a / b for a, b in zip(own, first, strict=True))
            goal = "" if name == "forward and backward" else f"{GOAL:g}"
            table.add_row(name, f"{1000 * min(own):.1f}", f"{ratio:.2f}", f"{middle:.2f}", goal)
        console.print(table)


if __name__ == "__main__":
    main()
