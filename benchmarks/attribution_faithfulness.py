"""How far attributions hold on a model of your own: three methods against each other, and faithfulness curves.

    python benchmarks/attribution_faithfulness.py --model HuggingFaceTB/SmolLM2-135M-Instruct --sae sae-9 --sae sae-19

Two tasks: the number of a verb ("The keys to the cabinet" -> " are" or " is"), where every pair of feature and token
is ablated, and the target is the right verb's logit less the wrong one's; prompts that the model gets wrong are left
out and counted. And the next word of a text (--texts, one JSON a line with `text`, that the SAEs were not trained on):
the log-probability of the token that the model finds most likely after its first words, with a sample of pairs. Every
prompt's numbers are kept in --out as they come, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sae_transformers import AttributionSettings, attribute, load
from sae_transformers.evaluation.attribution.effects import METHODS
from sae_transformers.evaluation.attribution.faithfulness import FaithfulnessCurve, pooled_curves, rank_correlation
from sae_transformers.evaluation.classification import mean_interval

SINGULAR = ("key", "author", "picture", "friend", "teacher", "report", "doctor", "letter")
MIDDLE = ("to the cabinets", "of the books", "near the windows", "with the dogs")


def agreement_prompts(limit: int) -> list[tuple[str, tuple[str, str]]]:
    """Prompts whose subject and the noun before the verb differ in number, and the right verb before the wrong one."""
    found = []
    for number, noun in enumerate(SINGULAR):
        middle = MIDDLE[number % len(MIDDLE)]
        found.append((f"The {noun} {middle}", (" is", " are")))
        found.append((f"The {noun}s {middle.removesuffix('s')}", (" are", " is")))
    return found[:limit]


def text_prompts(file: Path, skip: int, limit: int, words: int) -> list[str]:
    """The first words of texts that have more."""
    rows = [json.loads(line)["text"].split(" ") for line in file.read_text(encoding="utf-8").splitlines()[skip:]]
    return [" ".join(row[:words]) for row in rows if len(row) > words][:limit]


def most_likely(model: Any, tokenizer: Any, text: str) -> Any:
    """A target: the log-probability of the token that the model finds most likely after a text."""
    with torch.no_grad():
        token = int(model(**tokenizer(text, return_tensors="pt"), steering=False).logits[0, -1].argmax())

    def log_probability(output: Any) -> torch.Tensor:
        return output.logits[:, -1].log_softmax(-1)[:, token]

    return log_probability


def pairs_of(found: Any) -> dict[tuple[int, int, int], float]:
    pairs = found.effects.pairs
    keys = zip(pairs.sae.tolist(), pairs.position.tolist(), pairs.feature.tolist(), strict=True)
    return dict(zip(keys, found.effects.effect.tolist(), strict=True))


def measure(model: Any, tokenizer: Any, text: str, target: Any, args: Any, *, ablate: bool) -> dict:
    """Effects by each method, their rank correlations, and the curves, as JSON."""
    common = {"check": 0 if ablate else args.check, "draws": args.draws, "max_pairs": 10**6}
    made = {}
    for method in METHODS if ablate else METHODS[:2]:
        settings = AttributionSettings(**common, steps=args.steps, tokens_per_batch=args.tokens_per_batch)
        start = time.process_time()
        found = attribute(model, tokenizer, text, target, method, settings=settings)
        made[method] = (found, time.process_time() - start)
    first = made[METHODS[0]][0]
    facts: dict[str, Any] = {"text": text, "target": first.target, "value": first.effects.value}
    facts["curves"] = {method: found.curve.to_dict() for method, (found, _) in made.items()}
    facts["seconds"] = {method: seconds for method, (_, seconds) in made.items()}
    effects = {method: pairs_of(found) for method, (found, _) in made.items()}
    facts["pairs"] = len(effects[METHODS[0]])
    facts["ranks"] = {}
    if ablate:
        for one, other in ((0, 2), (1, 2), (0, 1)):
            a, b = (effects[METHODS[number]] for number in (one, other))
            ours, theirs = (torch.tensor([values[key] for key in a]) for values in (a, b))
            strong = theirs.abs().argsort(descending=True)[:50]
            facts["ranks"][f"{METHODS[one]} / {METHODS[other]}"] = {
                "all": rank_correlation(ours, theirs), "strongest 50": rank_correlation(ours[strong], theirs[strong]),
                "same sign of the strongest 50": float((ours[strong].sign() == theirs[strong].sign()).double().mean()),
            }  # fmt: skip
    else:
        for method, (found, _) in made.items():
            facts["ranks"][f"{method} / {METHODS[2]}"] = {
                f"{found.agreement.pairs} sampled": found.agreement.spearman,
                f"same sign of {found.agreement.pairs} sampled": found.agreement.same_sign,
            }
    return facts


def show(console: Console, task: str, rows: list[dict]) -> None:
    right = [row for row in rows if row["value"] > 0 or " - " not in row["target"]]
    pairs = statistics.mean(row["pairs"] for row in rows)
    console.print(f"{task}: {len(right)} of {len(rows)} prompts right, {pairs:,.0f} pairs each")
    if not right:
        return
    table = Table(
        "methods", "pairs", "mean over prompts", "95 % interval", "lowest", title=f"{task}: rank correlation"
    )
    for methods, kinds in right[0]["ranks"].items():
        for kind in kinds:
            values = [row["ranks"][methods][kind] for row in right]
            values = [value for value in values if not math.isnan(value)]
            mean, low, high = mean_interval(torch.tensor(values, dtype=torch.float64)).values()
            table.add_row(methods, kind, f"{mean:.3f}", f"{low:.3f} to {high:.3f}", f"{min(values):.3f}")
    console.print(table)
    table = Table("pairs", title=f"{task}: share of the target")
    methods = list(right[0]["curves"])
    for method in methods:
        table.add_column(f"kept, {method}")
    table.add_column("kept, random")
    for method in methods:
        table.add_column(f"removed, {method}")
    table.add_column("removed, random")
    curves = {m: pooled_curves([FaithfulnessCurve(**row["curves"][m]) for row in right]) for m in methods}
    for place, row in enumerate(curves[methods[0]]):
        of = [curves[method][place] for method in methods]
        cells = [
            *(one["keep"] for one in of),
            row["keep_random"],
            *(one["remove"] for one in of),
            row["remove_random"],
        ]
        table.add_row(str(row["n"]), *(f"{value:.2f}" for value in cells))
    console.print(table)
    moved = [curve["whole"] - curve["none"] for curve in (row["curves"][methods[0]] for row in right)]
    console.print(
        f"target {statistics.mean(row['value'] for row in right):.2f} on average, of which the latents move "
        f"{statistics.mean(moved):.2f}; CPU seconds a prompt: "
        + ", ".join(f"{m} {statistics.mean(row['seconds'][m] for row in right):.1f}" for m in methods)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", action="append", required=True, help="As attach takes it. Repeatable.")
    parser.add_argument("--texts", type=Path, help="JSON lines with text; without it one task is run.")
    parser.add_argument("--skip", type=int, default=0, help="First texts that are left out, as the SAEs know them.")
    parser.add_argument("--prompts", type=int, default=16, help="Of each task.")
    parser.add_argument("--words", type=int, default=12, help="Of a text.")
    parser.add_argument("--check", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("outputs/attribution/results.json"))
    args = parser.parse_args()
    console = Console(width=150)
    model, tokenizer, _ = load(args.model, args.sae)
    tasks: dict[str, tuple[list, bool]] = {"verb number": (agreement_prompts(args.prompts), True)}
    if args.texts is not None:
        texts = text_prompts(args.texts, args.skip, args.prompts, args.words)
        tasks["next word"] = ([(text, None) for text in texts], False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, list[dict]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for task, (prompts, ablate) in tasks.items():
        rows = done.setdefault(task, [])
        for text, target in prompts[len(rows) :]:
            aim = target or most_likely(model, tokenizer, text)
            rows.append(measure(model, tokenizer, text, aim, args, ablate=ablate))
            args.out.write_text(json.dumps(done, indent=1), encoding="utf-8")
        show(console, task, rows)


if __name__ == "__main__":
    main()
