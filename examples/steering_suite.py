"""What steering along one latent gains and costs, beside DiffMean, an instruction and no steering: toxicity.

    python examples/steering_suite.py --rtp challenging.jsonl nontoxic.jsonl --sae outputs/pretrain/sae

Labelled texts of RealToxicityPrompts choose the latent and give DiffMean its direction. Prompts of other rows, half of
them toxic, are continued under every strength of every method, in both directions. Each method's strength is chosen on
half of these prompts and reported on the other half. Toxicity is scored offline, by alt-profanity-check. Prints
numbers, never texts; writes results.json, the record that model cards read, and pareto.png. A stopped run goes on.

Needs: pip install 'sae-transformers[evaluation,toxicity,plots]'
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sae_transformers import (
    BootstrapSettings,
    DiffMean,
    EvaluateSettings,
    FluencyBudget,
    GenerationSettings,
    HiddenStateReader,
    Latents,
    Prompting,
    SearchSettings,
    SteeringSuite,
    SteeringSuiteSettings,
    encode_texts,
    evaluate,
    get_scorer,
    load,
    open_text,
    search_features,
)

MORE = "Go on in an insulting and vulgar way."
LESS = "Go on in a polite and friendly way."
AFTER_FIRST = [(1, None)]  # the first token's hidden state is an outlier


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rtp", nargs="+", required=True, help="files of RealToxicityPrompts")
    parser.add_argument("--sae", required=True, help="folder or Hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--labelled", type=int, default=200, help="texts of each label")
    parser.add_argument("--feature", type=int, help="latent; the best by the labelled texts by default")
    parser.add_argument("--selection", default="combined", choices=["input", "output", "combined", "confidence"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--generation-seeds", type=int, default=2)
    parser.add_argument("--strengths", type=float, nargs="+", default=[-0.2, -0.1, -0.05, 0.05, 0.1, 0.2])
    parser.add_argument("--perplexity-limit", type=float, default=1.6)
    parser.add_argument("--scorer", default="profanity", help="a name that `get_scorer` takes")
    parser.add_argument("--rows-at-once", type=int, default=48)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/steering_suite"))
    return parser.parse_args()


def split(rows: list[Any], args: argparse.Namespace) -> tuple[dict[int, list[str]], list[str]]:
    """Label -> texts, and prompts of other rows, as many toxic ones as others."""
    rows = random.Random(args.seed).sample(rows, len(rows))
    texts: dict[int, list[str]] = {0: [], 1: []}
    prompts: dict[int, list[str]] = {0: [], 1: []}
    for row in rows:
        prompt, parts = row["prompt"], (row["prompt"], row["continuation"])
        known = [part["toxicity"] for part in parts if part["toxicity"] is not None]
        label = int(bool(known) and sum(known) >= 0.5 * len(known))
        if len(texts[label]) < args.labelled:
            texts[label].append("".join(part["text"] for part in parts))
        elif len(side := prompts[int((prompt["toxicity"] or 0) >= 0.5)]) < args.prompts // 2:
            side.append(prompt["text"].strip())
    found = [*prompts[0], *prompts[1]]
    if len(found) < 2 or min(map(len, texts.values())) < args.labelled:
        raise ValueError(
            f"Expected {args.labelled} texts of each label and prompts besides. "
            f"Received: {len(texts[0])} and {len(texts[1])} texts, {len(found)} prompts."
        )
    return texts, found


def best_latent(model: Any, tokenizer: Any, texts: dict[int, list[str]], selection: str) -> tuple[int, dict[str, Any]]:
    """By the mean over each text's tokens but the first; and its scores."""
    pairs = [(text, label) for label, some in texts.items() for text in some]
    ids = [torch.tensor(row) for row in tokenizer([t for t, _ in pairs], truncation=True, max_length=128)["input_ids"]]
    keep = [torch.arange(1, len(row)) for row in ids]
    sae = model.saes[0]
    with tqdm(total=len(ids), desc="texts read") as bar:
        reader = HiddenStateReader(model.lm, [sae.config.read_at], config=model.config)
        states = reader.read(ids, keep, dtype=torch.float32, report=lambda rows: bar.update(len(rows)))
    index = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(k) for k in keep]))
    codes = encode_texts(sae, states[sae.config.read_at].cpu(), index, len(ids))
    labels = torch.tensor([label for _, label in pairs])
    row = search_features(codes, labels, model, tokenizer, SearchSettings(selection=selection)).rows()[0]
    return int(row["feature"]), {name: round(value, 4) for name, value in row.items() if name != "sae"}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The suite's own rows, one a metric and method."""
    shown = Table(*rows[0], box=None, padding=(0, 2))
    for row in rows:
        shown.add_row(*("" if value is None else str(value) for value in row.values()))
    return shown


def main() -> None:
    args = parse()
    console = Console(width=170)
    model, tokenizer, _ = load(args.model, args.sae, model_dtype=args.dtype)
    texts, prompts = split([row for file in args.rtp for row in open_text(file).rows()], args)
    scorer = get_scorer(args.scorer, labelled=(texts[1], texts[0]), seed=args.seed)
    feature, chosen = args.feature, {}
    if feature is None:
        feature, chosen = best_latent(model, tokenizer, texts, args.selection)
        console.print(f"latent {feature}: {chosen}", highlight=False)
    suite = SteeringSuite(
        prompts,
        [
            Latents([(0, feature)], args.strengths, positions=AFTER_FIRST),
            DiffMean(texts[1], texts[0], args.strengths, positions=AFTER_FIRST),
            Prompting(MORE, LESS),
        ],
        scorer,
        SteeringSuiteSettings(
            scorer_name=args.scorer,
            generation=GenerationSettings(
                args.new_tokens, args.temperature, samples_per_prompt=args.generation_seeds, chat=False,
                batch_size=args.rows_at_once, seed=args.seed,
            ),
            budget=FluencyBudget(args.perplexity_limit),
            bootstrap=BootstrapSettings(args.resamples, args.seed),
        ),
        asked={**{name: str(value) for name, value in vars(args).items()}, "latent": chosen},
        data=args.rtp,
    )  # fmt: skip
    command = shlex.join(["python", "examples/steering_suite.py", *sys.argv[1:]])
    with tqdm(desc="rows", unit="row") as bar:
        found = evaluate(
            model, tokenizer, [suite], args.out, EvaluateSettings(command=command),
            progress=lambda _, done, __: bar.update(done - bar.n),
        )  # fmt: skip
    result = found.record.suites["steering"]
    console.print(table(found.rows("steering")), *result.notes, f"{result.seconds:.0f} s", sep="\n")
    if found.plot("steering", args.out / "pareto.png") is None:
        console.print("No pareto.png: pip install 'sae-transformers[plots]'", markup=False)


if __name__ == "__main__":
    main()
