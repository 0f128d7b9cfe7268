"""Can the first tokens tell whether a steering will work, on concepts that were never seen?

    python benchmarks/will_it_work.py --data axbench_concept10_2b_l10 --model HuggingFaceTB/SmolLM2-135M-Instruct

For each of AxBench's ten concepts a difference of means at some layers is added with a ladder of strengths. What comes
of it (under, success, over) is measured on continuations of some prompts; the signs come from the first tokens of
others, and from the training texts. Then one concept after the other is left out: the forecaster is fitted to the
others and forecasts it. Prints macro-F1 beside the majority's, calibration and abstention; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_transformers import (
    FeatureEdit,
    FluencyBudget,
    GenerationSettings,
    Journal,
    SaeForCausalLM,
    Steering,
    continue_prompts,
    direction_sae,
    fit_diffmean,
    get_scorer,
    load,
    read_concept_sets,
)
from sae_transformers.evaluation.generation.continuations import chat_prompts
from sae_transformers.evaluation.generation.fluency import repetition
from sae_transformers.evaluation.steering.early_signs import DIFFERENCES, difference_agreement, early_signs
from sae_transformers.evaluation.steering.will_it_work import on_unseen_concepts, steering_outcome
from sae_transformers.evaluation.steering_methods.directions import text_means
from sae_transformers.modeling import SparseAutoencoderConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", required=True, help="folder in AxBench's layout")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 18])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.45])
    parser.add_argument("--concepts", type=int, help="the first ones only")
    parser.add_argument("--steered", type=int, help="of them that are steered; by default all")
    parser.add_argument("--texts", type=int, default=24, help="of each label, that fit a direction")
    parser.add_argument("--text-tokens", type=int, default=64, help="of such a text")
    parser.add_argument("--prompts", type=int, default=6, help="that say what comes of it")
    parser.add_argument("--early-prompts", type=int, default=4, help="whose first tokens are looked at")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--least-effect", type=float, default=0.1, help="of the concept's probability")
    parser.add_argument("--perplexity-ratio", type=float, default=2.0)
    parser.add_argument("--added-repetition", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/will_it_work"))
    return parser.parse_args()


def sides(one: Any, part: str, most: int, draw: random.Random) -> list[list[str]]:
    """Texts with the concept and without."""
    examples, labels = one.labelled(part)
    found = [[e.text for e, label in zip(examples, labels, strict=True) if label == side] for side in (1, 0)]
    return [draw.sample(texts, min(most, len(texts))) for texts in found]


def steered_model(args: argparse.Namespace, texts: Sequence[list[list[str]]]) -> tuple[Any, Any, list[list[dict]]]:
    """The model with an SAE of all concepts' directions at each layer; and the data's agreement, [layer][concept]."""
    import torch

    base, tokenizer, _ = load(args.model, [], model_dtype="float32")
    tokenizer.padding_side = "left"
    width = base.config.get_text_config().hidden_size
    places = [SparseAutoencoderConfig(d_in=width, d_sae=1, activation="relu", layer=n, site="resid_post")
              for n in args.layers]  # fmt: skip
    inner = base.unwrap()
    probe = SaeForCausalLM.from_base(inner, saes=[direction_sae(torch.ones(1, width), one) for one in places]).eval()
    agreements, saes = [], []
    for number, place in enumerate(places):
        means = [text_means(probe, tokenizer, pair, number, args.text_tokens, 16) for pair in texts]
        labels = [torch.tensor([1] * len(pair[0]) + [0] * len(pair[1])) for pair in texts]
        agreements.append([difference_agreement(*one) for one in zip(means, labels, strict=True)])
        saes.append(direction_sae(torch.stack([fit_diffmean(*one) for one in zip(means, labels, strict=True)]), place))
    model = SaeForCausalLM.from_base(probe.unwrap(), saes=saes).eval()
    return model, tokenizer, agreements


def main() -> None:
    args, start = parse(), time.process_time()
    sets = read_concept_sets(args.data)[: args.concepts]
    draw = random.Random(args.seed)
    fitting = [sides(one, "train", args.texts, draw) for one in sets]
    judged = [sides(one, "test", 200, draw) for one in sets]
    plain = {e.instruction for one in sets for e in one.test.get("negative", ()) if len(e.instruction) <= 100}
    chosen = random.Random(args.seed).sample(sorted(plain), args.prompts + args.early_prompts)
    prompts, early = chosen[: args.prompts], chosen[args.prompts :]
    model, tokenizer, agreements = steered_model(args, fitting)
    scorers = [get_scorer("words", labelled=(pair[0], pair[1]), seed=args.seed) for pair in judged]
    told = {name: str(value) for name, value in vars(args).items() if name != "steered"}
    journal = Journal(args.out / "journal.jsonl", told)
    generation = GenerationSettings(args.new_tokens, 0.7, batch_size=64, seed=args.seed)
    budget = FluencyBudget(args.perplexity_ratio, args.added_repetition)
    read, n = chat_prompts(tokenizer, prompts), len(prompts)
    base = continue_prompts(model, tokenizer, read, None, generation, journal=journal)
    signs, outcomes, concepts, rows = [], [], [], []
    for number, scorer in enumerate(scorers[: args.steered]):
        before = sum(scorer(base.texts)) / n
        for sae, layer in enumerate(args.layers):
            ways = [
                Steering([FeatureEdit(sae, number, "direction", value, "norm")], positions=[(1, None)])
                for value in args.strengths
            ]
            made = continue_prompts(
                model, tokenizer, read * len(ways), [way for way in ways for _ in read], generation,
                draws=list(range(n)) * len(ways), journal=journal,
            )  # fmt: skip
            for place, (way, strength) in enumerate(zip(ways, args.strengths, strict=True)):
                part = made.take(range(place * n, (place + 1) * n))
                effect = float(sum(scorer(part.texts)) / n - before)
                ratio, added = part.perplexity / base.perplexity, repetition(part.texts) - repetition(base.texts)
                outcome = steering_outcome(effect, ratio, added, least_effect=args.least_effect, budget=budget)
                seen = journal.result(
                    {"signs": way.to_dict(), "prompts": early},
                    lambda way=way: early_signs(model, tokenizer, early, way),
                )
                signs.append({**seen, **agreements[sae][number]})
                outcomes.append(outcome)
                concepts.append(str(number))
                rows.append({
                    "concept": number, "layer": layer, "strength": strength, "effect": effect, "ratio": ratio,
                    "added_repetition": added, "outcome": outcome, "signs": signs[-1],
                })  # fmt: skip
        print(f"concept {number}: {dict(Counter(outcomes[-len(args.layers) * len(args.strengths) :]))}", flush=True)
    report(args, signs, outcomes, concepts, rows)
    print(f"{time.process_time() - start:.0f} s of CPU, the journal's parts not counted")


def report(
    args: argparse.Namespace, signs: list[dict], outcomes: list[str], concepts: list[str], rows: list[dict]
) -> None:
    views: dict[str, list[dict]] = {
        "first tokens and differences": signs,
        "first tokens": [{k: v for k, v in row.items() if k not in DIFFERENCES} for row in signs],
        "dose and differences": [{k: v for k, v in row.items() if k in ("log_dose", *DIFFERENCES)} for row in signs],
        "dose": [{"log_dose": row["log_dose"]} for row in signs],
    }
    print(f"{len(outcomes)} steerings of {len(set(concepts))} concepts: {dict(Counter(outcomes))}")
    print(f"{'signs':30} {'macro-F1':>9} {'majority':>9} {'accuracy':>9} {'log loss':>9} {'held':>6} {'abstains':>9} "
          f"{'right of the rest':>18}")  # fmt: skip
    found = {}
    for name, view in views.items():
        one = on_unseen_concepts(view, outcomes, concepts)
        rest = "-" if one.accuracy_answered is None else f"{one.accuracy_answered:.2f}"
        print(f"{name:30} {one.macro_f1:9.3f} {one.majority_macro_f1:9.3f} {one.accuracy:9.3f} {one.log_loss:9.3f} "
              f"{one.coverage:6.2f} {one.abstained:9.2f} {rest:>18}")  # fmt: skip
        found[name] = {**one._asdict(), "forecasts": [list(f[:3]) for f in one.forecasts]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps({"unseen_concepts": found, "steerings": rows}, indent=1))


if __name__ == "__main__":
    main()
