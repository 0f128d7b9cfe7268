"""Detection and steering of AxBench's ten concepts (https://huggingface.co/papers/2501.17148), without a judge.

    python examples/axbench_concept10.py --data axbench_concept10_2b_l10 --sae outputs/pretrain/sae

Latents, directions and classifiers are fitted to the training answers of a concept (72 with it, 216 without any).
They are compared as detectors on the evaluation answers, hard negatives among the negatives. Then the model answers
some instructions while it is steered along latents that were found in several ways, along DiffMean, told by a prompt
what to bring in, or left alone. Each setting is chosen on half of the instructions and reported on the other half.
Latents are found without these instructions: by the training answers, by one forward pass, and by how they go along
with the concept in answers of the model's own to other instructions, half of them told what to bring in. With
--effect-latents some latents of each concept are steered one by one, and every selection score is compared with what
they did (Spearman's rank correlation). The judge is offline (`OfflineJudge`) and fitted to the evaluation answers,
which chose nothing else. AxBench's own ratings come from a language model: the numbers are not comparable. Prints
numbers, never texts; writes results.json, and keeps what it read and, until it is done, the answers in --out: a
stopped run goes on. Most of the time goes into reading 170,000 tokens and into generating.

Needs: pip install 'sae-transformers[evaluation]'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from sae_transformers import (
    FeatureEdit,
    GenerationSettings,
    HiddenStateReader,
    Journal,
    OfflineJudge,
    SaeForCausalLM,
    SearchSettings,
    SparseAutoencoder,
    Steering,
    SteeringMethod,
    auroc,
    chat_prompts,
    code_aurocs,
    continue_prompts,
    direction_sae,
    encode_texts,
    evaluate_concept_steering,
    fit_diffmean,
    fit_linear_probe,
    generated_correlations,
    get_scorer,
    load,
    prompt_ids,
    read_concept_sets,
    search_features,
)

METHODS = {
    "none": "none",
    "unselected": "latent of the lower half of the pool",
    "auroc": "latent by AUROC",
    "output": "latent by output score",
    "both": "latent by both",
    "confidence": "latent by delta confidence",
    "correlation": "latent by correlation",
    "effect": "latent by effect",
    "tried": "latents by both, tried by generating",
    "clamped": "latent by both, clamped",
    "diffmean": "DiffMean",
    "prompt": "prompt",
}
SELECTION = {"auroc": "input", "output": "output", "both": "combined", "confidence": "confidence"}
SELECTION |= {"correlation": "correlation", "effect": "effect"}
TOLD = "{text}\n\nIn your answer, bring in this: {concept}."
STATISTICS = ("auroc", "mutual_information", "mean_difference")
MEASURES = ("concept", "instruction", "fluency", "overall", "perplexity", "repetition")


class Part(NamedTuple):
    """Labelled answers of a concept. states: (n, d), means over tokens. codes: (n, d_sae), likewise, of
    `encode_texts`."""

    texts: list[str]
    labels: Tensor
    states: Tensor
    codes: Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", required=True, help="folder in AxBench's layout")
    parser.add_argument("--sae", required=True, help="folder or Hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of an answer that is read")
    parser.add_argument("--instructions", type=int, default=10, help="to steer on; half choose, half report")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; greedy text is hard to match")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    parser.add_argument("--searched", type=int, default=3, help="latents of the method `tried`")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="to steer by")
    parser.add_argument("--pool", type=int, default=50, help="latents whose output score is measured")
    parser.add_argument("--outcome-answers", type=int, default=32, help="that latents are correlated with")
    parser.add_argument("--effect-latents", type=int, default=0, help="of a concept that are steered one by one")
    parser.add_argument("--effect-strength", type=float, default=0.1, help="of these, in norms of the hidden state")
    parser.add_argument("--rows-at-once", type=int, default=70)
    parser.add_argument("--concepts", type=int, help="the first ones only")
    parser.add_argument("--instruction-characters", type=int, default=100, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-steering", action="store_true", help="detection only")
    parser.add_argument("--out", type=Path, default=Path("outputs/axbench_concept10"))
    return parser.parse_args()


# -- data ------------------------------------------------------------------------------------------------------------


class Reading:
    """Mean states and pooled latents of answers, each read after its instruction; an answer is read once."""

    def __init__(self, base: Any, tokenizer: Any, sae: SparseAutoencoder, answer_tokens: int) -> None:
        self.tokenizer, self.sae, self.answer_tokens = tokenizer, sae, answer_tokens
        self.reader = HiddenStateReader(base, [sae.config.read_at])

    def read_once(self, examples: Sequence[Any], cache: Path) -> tuple[Tensor, Any]:
        """As `read`, from the file if that is of the same texts, SAE and settings."""
        of = f"{self.answer_tokens} {self.reader.model.dtype} {float(self.sae.W_enc.detach().sum())} {list(examples)}"
        key = hashlib.sha256(of.encode()).hexdigest()
        if cache.exists():
            kept = torch.load(cache, weights_only=False)  # written below
            if kept["of"] == key:
                return kept["states"], kept["codes"]
        states, codes = self.read(examples)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"of": key, "states": states, "codes": codes}, cache)
        return states, codes

    def read(self, examples: Sequence[Any]) -> tuple[Tensor, Any]:
        """(n, d) and (n, d_sae)."""
        before = self.tokenizer([self.asked(e.instruction) for e in examples])["input_ids"]
        answers = self.tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
        answers = [row[: self.answer_tokens] for row in answers]
        ids = [torch.tensor(a + b) for a, b in zip(before, answers, strict=True)]
        keep = [torch.arange(len(a), len(a) + len(b)) for a, b in zip(before, answers, strict=True)]
        with tqdm(total=len(ids), desc="answers read") as bar:
            states = self.reader.read(ids, keep, dtype=torch.float32, report=lambda rows: bar.update(len(rows)))
        hidden = states[self.sae.config.read_at].cpu()
        index = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(k) for k in keep]))
        means = torch.zeros(len(ids), hidden.shape[1]).index_add_(0, index, hidden) / torch.bincount(index)[:, None]
        return means, encode_texts(self.sae, hidden, index, len(ids))

    def asked(self, instruction: str) -> str:
        """In the chat template, if there is one."""
        if not self.tokenizer.chat_template:
            return instruction
        messages = [{"role": "user", "content": instruction}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def read_parts(sets: Sequence[Any], reading: Reading, cache: Path) -> list[tuple[Part, Part]]:
    """Training and evaluation part of each concept. What is read is kept in a file."""
    labelled = [tuple(one.labelled(part) for part in ("train", "test")) for one in sets]
    different = list(dict.fromkeys(e for parts in labelled for examples, _ in parts for e in examples))
    states, codes = reading.read_once(different, cache)
    place = {example: number for number, example in enumerate(different)}
    found = []
    for parts in labelled:
        made = []
        for examples, labels in parts:
            rows = torch.tensor([place[e] for e in examples])
            kept = torch.tensor(sorted(set(rows.tolist())))  # a text that occurs twice counts once
            first = [rows.tolist().index(row) for row in kept.tolist()]
            texts = [examples[i].text for i in first]
            made.append(Part(texts, torch.tensor(labels)[first], states[kept], codes.take_rows(kept)))
        found.append((made[0], made[1]))
    return found


def steering_instructions(sets: Sequence[Any], args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Instructions of evaluation answers without any concept, with those answers, the same for all concepts: those to
    steer on, and others to choose latents by."""
    plain = [example for one in sets for example in one.test.get("negative", ()) if one.genre == "text"]
    short = {e.instruction: e for e in plain if len(e.instruction) <= args.instruction_characters}
    asked = random.Random(args.seed).sample(list(short.values()), args.instructions)
    others = [e for e in short.values() if e not in asked]
    count = min(len(others), args.outcome_answers // 2)
    return asked, random.Random(args.seed + 1).sample(others, count)


# -- detection -------------------------------------------------------------------------------------------------------


def detect(train: Part, test: Part, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """AUROC on the evaluation answers of what was fitted to the training answers."""
    on_test = code_aurocs(test.codes, test.labels)
    chosen = {}
    for name in STATISTICS:
        found = search_features(train.codes, train.labels, settings=SearchSettings(name, "input"))
        chosen[name] = int(found.features[0])
    direction = fit_diffmean(train.states, train.labels)
    probe = fit_linear_probe(train.states, train.labels, seed=seed)
    positives = [text for text, label in zip(train.texts, train.labels.tolist(), strict=True) if label]
    negatives = [text for text, label in zip(train.texts, train.labels.tolist(), strict=True) if not label]
    words = get_scorer("words", labelled=(positives, negatives), seed=seed)
    live = torch.tensor(sorted(set(train.codes.live().tolist()) & set(test.codes.live().tolist())))
    aurocs = {f"latent chosen by {name.replace('_', ' ')}": float(on_test[f]) for name, f in chosen.items()}
    aurocs |= {
        "latents not chosen (mean over live ones)": float(on_test[live].mean()),
        "best latent on the evaluation answers themselves": float(on_test.max()),
        "DiffMean": auroc(test.states @ direction, test.labels),
        "linear probe": auroc(probe.score(test.states), test.labels),
        "bag of words": auroc(words(test.texts), test.labels),
    }
    return aurocs, chosen


# -- steering --------------------------------------------------------------------------------------------------------


def ladder(sae: int, features: Sequence[int], strengths: Sequence[float], op: str = "direction") -> SteeringMethod:
    """Strengths in hidden norms, of one latent after the other."""
    edits = [(f, s, FeatureEdit(sae, f, op, s, "norm")) for f in features for s in strengths]
    return SteeringMethod([f"{op} {f} {s:g}" for f, s, _ in edits], [Steering([edit]) for *_, edit in edits])


def methods_for(
    concept: str, number: int, found: Mapping[str, Any], instructions: Sequence[str], args: Any
) -> dict[str, SteeringMethod]:
    told = [TOLD.format(text=text, concept=concept) for text in instructions]
    features = found["input"].features
    draw = random.Random(args.seed + number).choice(features[len(features) // 2 :].tolist())
    first = {name: int(found[selection].features[0]) for name, selection in SELECTION.items()}
    combined = found["combined"].features[: args.searched].tolist()
    made = {
        "none": SteeringMethod(["none"], [None]),
        "unselected": ladder(0, [draw], args.strengths),
        **{name: ladder(0, [feature], args.strengths) for name, feature in first.items()},
        "tried": ladder(0, combined, args.strengths),
        "clamped": ladder(0, [first["both"]], args.strengths, "set"),
        "diffmean": ladder(1, [number], args.strengths),
        "prompt": SteeringMethod(["prompt"], [None], told),
    }
    return {METHODS[name]: made[name] for name in METHODS if name == "none" or name in args.methods}


def offline_judge(one: Any, asked: Sequence[Any], train: Part, seed: int) -> tuple[OfflineJudge, float]:
    """Fitted to the evaluation answers but those to the instructions; and its AUROC on the training answers."""
    left_out = {e.instruction for e in asked}
    examples, labels = one.labelled("test")
    kept = [(e.text, y) for e, y in zip(examples, labels, strict=True) if e.instruction not in left_out]
    judge = OfflineJudge(
        [t for t, y in kept if y],
        [t for t, y in kept if not y],
        {e.instruction: e.text for e in asked},
        seed=seed,
    )
    return judge, auroc(judge.score(train.texts), train.labels)


def correlate(
    model: Any, tokenizer: Any, one: Any, train: Part, others: Sequence[Any], generation: Any, journal: Journal
) -> Tensor:
    """(d_sae,), of each latent over the model's own answers with how much of the concept is in them, by a classifier
    of words that is fitted to training answers. Half of the answers are told to bring the concept in."""
    positives = [text for text, label in zip(train.texts, train.labels.tolist(), strict=True) if label]
    negatives = [text for text, label in zip(train.texts, train.labels.tolist(), strict=True) if not label]
    scorer = get_scorer("words", labelled=(positives, negatives), seed=generation.seed)
    plain = [e.instruction for e in others]
    told = [TOLD.format(text=text, concept=one.concept) for text in plain]
    before, made = [], []
    for asked in (chat_prompts(tokenizer, plain), chat_prompts(tokenizer, told)):
        made.append(continue_prompts(model, tokenizer, asked, None, generation, journal=journal))
        before += prompt_ids(model, tokenizer, asked, 0)
    texts, ids = [t for part in made for t in part.texts], [i for part in made for i in part.ids]
    return generated_correlations(model, before, ids, torch.as_tensor(scorer(texts)))[0]


def effects(
    model: Any,
    tokenizer: Any,
    instructions: Sequence[str],
    found: Mapping[str, Any],
    judge: OfflineJudge,
    generation: Any,
    journal: Journal,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """What some latents of the pool do to answers, each steered alone, beside their selection scores."""
    pool = found["input"].features.tolist()
    some = random.Random(args.seed).sample(pool, min(len(pool), args.effect_latents))
    n, asked = len(instructions), chat_prompts(tokenizer, instructions)
    steerings = [None, *(Steering([FeatureEdit(0, f, "direction", args.effect_strength, "norm")]) for f in some)]
    answers = continue_prompts(
        model, tokenizer, asked * len(steerings), [s for s in steerings for _ in range(n)], generation,
        draws=list(range(n)) * len(steerings), journal=journal,
    )  # fmt: skip
    ratings = judge(list(instructions) * len(steerings), answers, answers.take(range(n)).perplexity)
    rows = {feature: {"feature": feature} for feature in some}
    for search in found.values():
        for row in search.rows():
            if row["feature"] in rows:
                rows[int(row["feature"])] |= {k: v for k, v in row.items() if k != "sae"}
    places = [{int(f): place for place, f in enumerate(found[name].features)} for name in ("combined", "effect")]
    for number, feature in enumerate(some, start=1):
        more = {f"{name}_effect": getattr(ratings, name).view(-1, n).mean(1) for name in ("concept", "overall")}
        rows[feature] |= {name: float(means[number] - means[0]) for name, means in more.items()}
        rows[feature] |= {"both": -float(places[0][feature]), "effect": -float(places[1][feature])}
    return list(rows.values())


def steer(
    sets: Sequence[Any],
    parts: Sequence[tuple[Part, Part]],
    base: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    args: argparse.Namespace,
) -> Iterator[tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]]:
    """Method -> a row a concept, after each concept; and what was found on the way."""
    directions = torch.stack([fit_diffmean(train.states, train.labels) for train, _ in parts])
    model: Any = SaeForCausalLM.from_base(base, saes=[sae, direction_sae(directions, sae.config)])
    model = model.to(base.device).eval()
    asked, others = steering_instructions(sets, args)
    instructions = [example.instruction for example in asked]
    rows: dict[str, list[dict[str, Any]]] = {}
    facts: dict[str, Any] = {"judge_auroc": [], "latents": [], "effects": []}
    journal = Journal(args.out / "answers.partial.jsonl", {key: str(value) for key, value in vars(args).items()})
    generation = GenerationSettings(args.new_tokens, args.temperature, batch_size=args.rows_at_once, seed=args.seed)
    for number, (one, (train, _)) in enumerate(zip(sets, parts, strict=True)):
        correlations = correlate(model, tokenizer, one, train, others, generation, journal)
        found = {
            selection: search_features(
                train.codes, train.labels, model, tokenizer, SearchSettings(selection=selection, pool=args.pool),
                correlations=correlations,
            )
            for selection in SELECTION.values()
        }  # fmt: skip
        judge, known = offline_judge(one, [*asked, *others], train, args.seed)
        facts["judge_auroc"].append(known)
        facts["latents"].append({name: search.rows()[0] for name, search in found.items()})
        if args.effect_latents:
            facts["effects"].append(effects(model, tokenizer, instructions, found, judge, generation, journal, args))
        methods = methods_for(one.concept, number, found, instructions, args)
        same = {name: next(n for n, m in methods.items() if m == method) for name, method in methods.items()}
        different = {name: method for name, method in methods.items() if same[name] == name}
        total = len(instructions) * (
            1 + sum(len(m.settings) for name, m in different.items() if name != METHODS["none"])
        )
        with tqdm(total=total, desc=f"answers, concept {number}") as bar:
            results = evaluate_concept_steering(
                model, tokenizer, instructions, different, judge, generation, report=bar.update, journal=journal
            )
        for name, first in same.items():
            result = results[first]
            rows.setdefault(name, []).append({**result.numbers(), "setting": result.setting, "curve": result.curve})
        yield rows, facts
    journal.remove()


# -- the run ---------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    """The mean over concepts and half of Student's 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def rank_correlations(effects: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Selection score -> change -> Spearman's rho over the latents of each concept; 0 where one is constant."""
    scores = ("auroc", "output_score", "both", "delta_confidence", "correlation", "effect")
    found: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        for change in ("concept_effect", "overall_effect"):
            for rows in effects:
                values = [abs(row[score]) if score == "delta_confidence" else row[score] for row in rows]
                ranked: Any = stats.spearmanr(values, [row[change] for row in rows])
                rho = float(ranked.statistic)
                found.setdefault(score, {}).setdefault(change, []).append(0.0 if rho != rho else rho)
    return found


def main() -> None:
    args = parse()
    console = Console(width=170)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    sets = read_concept_sets(args.data)[: args.concepts]
    loaded, tokenizer, name = load(args.model, [], model_dtype=args.dtype)
    base: Any = loaded.lm
    sae = SparseAutoencoder.from_pretrained(args.sae)
    parts = read_parts(sets, Reading(base, tokenizer, sae, args.answer_tokens), args.out / "states.pt")
    seconds["reading"] = round(time.perf_counter() - start, 1)
    detection: dict[str, list[float]] = {}
    latents = []
    for train, test in parts:
        found, chosen = detect(train, test, args.seed)
        latents.append(chosen)
        for method, value in found.items():
            detection.setdefault(method, []).append(value)
    seconds["detection"] = round(time.perf_counter() - start - sum(seconds.values()), 1)
    table = Table("AUROC on evaluation answers", f"mean over {len(sets)} concepts ± half a 95 % interval", "least")
    for method, values in detection.items():
        table.add_row(method, interval(values), f"{min(values):.3f}")
    console.print(table)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings |= {"data": Path(args.data).name, "model": Path(name).name, "sae": Path(args.sae).name}
    record: dict[str, Any] = {
        "settings": settings,
        "counts": [
            {"train": len(a.texts), "evaluation": len(b.texts), "positive": int(b.labels.sum())} for a, b in parts
        ],
        "detection": {"auroc": detection, "latents": latents},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    file.write_text(json.dumps({**record, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
    if not args.no_steering:
        rows: dict[str, list[dict[str, Any]]] = {}
        facts: dict[str, Any] = {}
        before = sum(seconds.values())
        for rows, facts in steer(sets, parts, base, tokenizer, sae, args):
            seconds["steering"] = round(time.perf_counter() - start - before, 1)
            record["steering"] = {"methods": rows, **facts}
            file.write_text(json.dumps({**record, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
        table = Table("steering", *MEASURES, "overall to none", title="0 to 2, offline judge; mean over concepts")
        for method, found in rows.items():
            change = [a["overall"] - b["overall"] for a, b in zip(found, rows[METHODS["none"]], strict=True)]
            table.add_row(method, *(interval([row[m] for row in found]) for m in MEASURES), interval(change))
        console.print(table)
        console.print(f"judge: AUROC on training answers {interval(facts['judge_auroc'])}")
        if facts["effects"]:
            table = Table("rank correlation with", "change of concept", "change of overall", title="Spearman's rho")
            for score, change in rank_correlations(facts["effects"]).items():
                table.add_row(score, *(interval(change[name]) for name in ("concept_effect", "overall_effect")))
            console.print(table)
    console.print(seconds)


if __name__ == "__main__":
    main()
