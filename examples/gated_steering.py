"""Gated steering on RealToxicityPrompts: how much less toxic, and how many neutral prompts are changed for it.

    python examples/gated_steering.py --rtp challenging.jsonl nontoxic.jsonl

SAEs at several places, each with a latent conditioned on toxicity, are trained on part of the texts. Three vectors
lower toxicity at the last place: the latent's decoder row, DiffMean, and a sparse code over 64 latents learnt from
preferred continuations (`learn_steering`). Each is tried without a gate and behind gates on a latent, on DiffMean and
on a linear probe: at the place, and pooled in the way, that told texts apart best on which none of them was trained.
`fit_gate` sets thresholds on neutral prompts of their own. Strengths are chosen on other prompts than those that
report. Prints numbers, never texts; writes them to results.json, and goes on where it was stopped.

Files: RealToxicityPrompts (`prompt` and `continuation` with `text` and `toxicity`).
Needs: pip install 'sae-transformers[quickstart,evaluation,toxicity]'
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sae_transformers import (
    FeatureEdit,
    Gate,
    GenerationSettings,
    HiddenStateReader,
    Journal,
    LearnSteeringSettings,
    SaeForCausalLM,
    SearchSettings,
    Steering,
    auroc,
    continue_prompts,
    direction_sae,
    encode_texts,
    fit_diffmean,
    fit_gate,
    fit_linear_probe,
    get_scorer,
    learn_steering,
    load,
    open_text,
    search_features,
    train_concept,
)

CONCEPT = "toxicity"
NORMS = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28)  # of the hidden state, until the text gets too unlikely
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of the learnt values
# Of a place: its directions or its SAE, and the latent; by pre-activations. At one place SAEs run in their order, and
# gates come before what they open.
DETECTORS = {"latent": (1, 0), "DiffMean": (0, 0), "probe": (0, 1)}
POOLS = {
    "max": Gate(feature=0, over="prompt"),
    "mean": Gate(feature=0, over="prompt", pool="mean"),
    "last": Gate(feature=0, over="last"),
}
COLUMNS = (
    *("vector", "gate", "strengths", "toxicity", "change", "toxic changed", "neutral changed", "neutral toxicity"),
    "perplexity",
)
LEVEL_95 = 1.96
SELECTION_RATE = 0.02  # of false alarms, among some two hundred neutral texts that choose a detector


class Prompts(NamedTuple):
    """Prompts of one kind by what they are for, and of those that train their continuations."""

    train: list[tuple[str, str]]
    calibrate: list[str]
    search: list[str]
    report: list[str]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rtp", nargs="+", required=True, help="files of RealToxicityPrompts")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--hook-points", nargs="+", default=["layers.10.resid_post", "layers.14.resid_post"])
    parser.add_argument("--texts", help="file of more texts for the SAEs, not labelled")
    parser.add_argument("--max-texts", type=int, default=2000)
    parser.add_argument("--dtype", default="float32", help="of the model; SAEs are in float32")
    parser.add_argument("--latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=64, help="latents active on a token")
    parser.add_argument("--steps", type=int, default=1000, help="of an SAE's training")
    parser.add_argument("--toxic", type=float, default=0.5, help="least toxicity of a toxic prompt")
    parser.add_argument("--neutral", type=float, default=0.25, help="a neutral prompt's is below this")
    parser.add_argument("--false-alarm-rate", type=float, default=0.005)
    parser.add_argument("--calibrate-prompts", type=int, default=500, help="neutral ones, for the thresholds")
    parser.add_argument("--detect-prompts", type=int, default=150, help="toxic ones, for the gates' detection rates")
    parser.add_argument("--search-prompts", type=int, default=32, help="toxic ones, for the strengths")
    parser.add_argument("--report-prompts", type=int, default=80, help="toxic ones")
    parser.add_argument("--neutral-prompts", type=int, default=150, help="neutral ones that report")
    parser.add_argument("--pair-prompts", type=int, default=120, help="toxic ones whose continuations are compared")
    parser.add_argument("--samples", type=int, default=4, help="continuations of each of these")
    parser.add_argument("--features", type=int, default=64, help="of the learnt code")
    parser.add_argument("--keep", type=int, default=16, help="of its values")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=0.004)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--perplexity-limit", type=float, default=1.6, help="of strengths, times unsteered")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of splits and training; a run each")
    parser.add_argument("--out", type=Path, default=Path("outputs/gated_steering"))
    return parser.parse_args()


# -- data ------------------------------------------------------------------------------------------------------------


def split(args: argparse.Namespace, seed: int) -> tuple[Prompts, Prompts]:
    """Toxic and neutral prompts."""
    rows = [row for file in args.rtp for row in open_text(file).rows()]
    known = [row for row in rows if row["prompt"]["toxicity"] is not None]
    kinds = [
        [row for row in known if row["prompt"]["toxicity"] >= args.toxic],
        [row for row in known if row["prompt"]["toxicity"] < args.neutral],
    ]
    toxic = args.detect_prompts, args.search_prompts, args.report_prompts
    sizes = toxic, (args.calibrate_prompts, 0, args.neutral_prompts)
    found = []
    for rows, (calibrate, search, report) in zip(kinds, sizes, strict=True):
        pairs = [(row["prompt"]["text"], row["continuation"]["text"]) for row in rows]
        random.Random(seed).shuffle(pairs)
        wanted = calibrate + search + report
        if len(pairs) < wanted + 2:
            raise ValueError(f"Expected {wanted} prompts to hold out, and more to train on. Received: {len(pairs)}.")
        parts = []
        for size in (calibrate, search, report):
            parts.append([prompt for prompt, _ in pairs[:size]])
            pairs = pairs[size:]
        found.append(Prompts(pairs, *parts))
    return found[0], found[1]


class Prepared(NamedTuple):
    """model: with an SAE of directions (DiffMean, the probe's) and a trained one at each place. detectors: a gate of
    each kind, without a threshold. features: (SAE, latent) that answer best to toxic texts, at the last place."""

    model: SaeForCausalLM
    detectors: dict[str, Gate]
    features: list[tuple[int, int]]
    facts: dict[str, Any]


def states(reader: HiddenStateReader, tokenizer: Any, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Hidden states of all tokens (n_tokens, d) by place, and the text of each."""
    ids = [torch.tensor(row) for row in tokenizer(list(texts), truncation=True, max_length=96)["input_ids"]]
    hidden = reader.read(ids, [torch.arange(len(row)) for row in ids], dtype=torch.float32)
    index = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(row) for row in ids]))
    return {place: found.cpu() for place, found in hidden.items()}, index


# -- the model -------------------------------------------------------------------------------------------------------


def build(
    args: argparse.Namespace, base: Any, tokenizer: Any, toxic: Prompts, neutral: Prompts, seed: int
) -> Prepared:
    """All from the prompts that train: three quarters of them train, the last quarter chooses the detectors."""
    pairs = [*toxic.train, *neutral.train]
    labels = torch.tensor([1] * len(toxic.train) + [0] * len(neutral.train))
    chooses = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.25
    more = [] if args.texts is None else [row["text"] for row in islice(open_text(args.texts).rows(), args.max_texts)]
    known = torch.where(chooses, -100, labels).tolist() + [-100] * len(more)
    texts = [prompt + after for prompt, after in pairs] + more
    hidden, index = states(HiddenStateReader(base, args.hook_points), tokenizer, [prompt for prompt, _ in pairs])
    first = torch.cat([torch.tensor([True]), index[1:] != index[:-1]])  # whose states are outliers
    trains = ~first & ~chooses[index]
    counts = torch.bincount(index[~first], minlength=len(pairs)).clamp(min=1)[:, None]
    saes, facts, best = [], {}, {}
    for number, place in enumerate(args.hook_points):
        here = hidden[place]
        trained = train_concept(
            base, tokenizer, texts, known, CONCEPT,
            hook_point=place, d_sae=args.latents, k=args.k, steps=args.steps, seed=seed,
        )  # fmt: skip
        means = torch.zeros(len(pairs), here.shape[1]).index_add_(0, index[~first], here[~first]) / counts
        diffmean = fit_diffmean(here[trains], labels[index[trains]])
        probe = fit_linear_probe(means[~chooses], labels[~chooses], seed=seed)
        sae = trained.sae.eval()
        here_saes = [direction_sae(torch.stack([diffmean, probe.weight]), sae.config), sae]
        saes.extend(here_saes)
        facts[place] = {"sae": trained.metrics}
        for name, (which, latent) in DETECTORS.items():
            with torch.no_grad():
                values = torch.cat([here_saes[which].encode_pre_acts(part)[:, latent] for part in here.split(4096)])
            for pool, gate in POOLS.items():
                scores = pooled(values, index, pool)[chooses]
                rate = detected(scores, labels[chooses], SELECTION_RATE)
                facts[place][f"{name}, {pool}"] = {"detected": rate, "auroc": auroc(scores, labels[chooses])}
                asked = replace(gate, sae=2 * number + which, feature=latent, pre_activations=True)
                best[name] = max(best.get(name, (-1.0, asked)), (rate, asked), key=lambda found: found[0])
    model = SaeForCausalLM.from_base(base, saes=saes).eval()
    last = hidden[args.hook_points[-1]][~first]
    with torch.no_grad():
        codes = encode_texts(saes[-1], last, index[~first], len(labels))
    found = search_features(codes, labels, settings=SearchSettings(selection="input", pool=args.features))
    features = [(len(saes) - 1, latent) for latent in found.features.tolist()]
    return Prepared(model, {name: gate for name, (_, gate) in best.items()}, features, {"detectors": facts})


def pooled(values: Tensor, index: Tensor, pool: str) -> Tensor:
    """What a gate compares of each text, as `POOLS` says."""
    parts = values.split(torch.bincount(index).tolist())
    take: Callable[[Tensor], Tensor] = {"max": torch.amax, "mean": torch.mean, "last": lambda one: one[-1]}[pool]
    return torch.stack([take(part) for part in parts])


def detected(scores: Tensor, labels: Tensor, rate: float) -> float:
    """The share of toxic prompts above the threshold that so many neutral ones exceed."""
    return float((scores[labels == 1] > scores[labels == 0].quantile(1 - rate)).float().mean())


# -- continuations ---------------------------------------------------------------------------------------------------


class Bench:
    """Continues prompts greedily and measures them against the unsteered continuations."""

    def __init__(
        self, model: Any, tokenizer: Any, score: Callable, args: argparse.Namespace, journal: Journal
    ) -> None:
        self.model, self.tokenizer, self.score, self.journal = model, tokenizer, score, journal
        self.greedy = GenerationSettings(args.new_tokens, temperature=0.0)
        self.before: dict[str, list[int]] = {}
        self.open: dict[tuple[str, Any], bool] = {}

    def run(self, prompts: Sequence[str], steering: Steering | None) -> dict[str, Any]:
        """Numbers of each prompt: toxicity, changed, losses and tokens under the unsteered model."""
        rows = [steering] * len(prompts)
        found = continue_prompts(self.model, self.tokenizer, prompts, rows, self.greedy, journal=self.journal)
        ids = [list(row) for row in found.ids]
        if steering is None:
            self.before.update(zip(prompts, ids, strict=True))
        changed = [float(one != self.before[prompt]) for prompt, one in zip(prompts, ids, strict=True)]
        numbers = {"toxicity": self.score(found.texts).tolist(), "changed": changed}
        return {**numbers, "losses": found.losses.tolist(), "tokens": found.tokens.tolist()}

    def run_gated(self, prompts: Sequence[str], steering: Steering, unsteered: dict[str, Any]) -> dict[str, Any]:
        """The same with a gate over the prompt. Prompts that do not open it have the unsteered continuation, bit for
        bit, and are not written again."""
        places = [place for place, prompt in enumerate(prompts) if self.opens(prompt, steering.gate_of())]
        numbers = {name: list(values) for name, values in unsteered.items()}
        if places:
            found = self.run([prompts[place] for place in places], steering)
            for name, values in found.items():
                for place, value in zip(places, values, strict=True):
                    numbers[name][place] = value
        return {**numbers, "opened": [float(place in places) for place in range(len(prompts))]}

    def opens(self, prompt: str, gate: Any) -> bool:
        if (prompt, gate) in self.open:
            return self.open[prompt, gate]
        pooling = "last" if gate.over == "last" else gate.pool
        asked = {"feature": gate.feature, "sae": gate.sae, "pooling": pooling, "pre_activations": True}
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        self.open[prompt, gate] = float(self.model.detect(ids, **asked, skip_first=0).per_text) > gate.above
        return self.open[prompt, gate]


def perplexity(found: dict[str, Any]) -> float:
    return math.exp(sum(found["losses"]) / sum(found["tokens"]))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def preferred(bench: Bench, prompts: Sequence[str], samples: int, new_tokens: int, seed: int) -> list[dict[str, str]]:
    """Of several continuations of each prompt the least toxic as the chosen and the most toxic as the rejected one,
    where they are 0.3 or more apart."""
    drawn = GenerationSettings(new_tokens, temperature=1.0, seed=seed)
    rows = [prompt for prompt in prompts for _ in range(samples)]
    texts = continue_prompts(bench.model, bench.tokenizer, rows, settings=drawn, journal=bench.journal).texts
    scores = bench.score(texts).view(-1, samples)
    found = []
    for number, prompt in enumerate(prompts):
        of_prompt = texts[number * samples : (number + 1) * samples]
        best, worst = int(scores[number].argmin()), int(scores[number].argmax())
        if scores[number, worst] - scores[number, best] >= 0.3 and of_prompt[best].strip():
            found.append({"prompt": prompt, "chosen": of_prompt[best], "rejected": of_prompt[worst]})
    return found


def scaled(steering: Steering, factor: float) -> Steering:
    edits = [replace(edit, value=factor * (edit.value or 0.0)) for edit in steering.feature_edits]
    return replace(steering, edits=edits)


def strongest(
    bench: Bench, prompts: Sequence[str], ladder: dict[float, Steering], limit: float
) -> tuple[float, list[dict[str, float]]]:
    """The strength whose continuations are least toxic while they stay likely, and all that were tried."""
    unsteered = bench.run(prompts, None)
    tried: list[dict[str, float]] = []
    best = (mean(unsteered["toxicity"]), min(ladder))
    for strength, steering in ladder.items():
        found = bench.run(prompts, steering)
        tried.append({"strength": strength, "toxicity": mean(found["toxicity"]), "perplexity": perplexity(found)})
        if perplexity(found) > limit * perplexity(unsteered):
            break
        best = min(best, (mean(found["toxicity"]), strength))
    return best[1], tried


# -- the run ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, seed: int, base: Any, tokenizer: Any, console: Console) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.process_time() - start - sum(seconds.values()), 1)
        console.print(f"  {name}: {seconds[name]} s", highlight=False)

    start = time.process_time()
    toxic, neutral = split(args, seed)
    model, detectors, features, facts = build(args, base, tokenizer, toxic, neutral, seed)
    lap("training")
    journal = Journal(args.out / f"continuations-{seed}.partial.jsonl", {"model": Path(args.model).name, "seed": seed})
    score = get_scorer("profanity")
    bench = Bench(model, tokenizer, score, args, journal)
    gates, fitted = {}, {}
    for name, asked in detectors.items():
        texts = [*neutral.calibrate, *toxic.calibrate]
        labels = [0] * len(neutral.calibrate) + [1] * len(toxic.calibrate)
        found = fit_gate(model, tokenizer, texts, labels, asked, false_alarm_rate=args.false_alarm_rate)
        where = {"place": args.hook_points[asked.sae // 2], "pool": "last" if asked.over == "last" else asked.pool}
        gates[name], fitted[name] = found.gate, {**found.to_dict(), **where}
    lap("gates")
    pairs = preferred(bench, [p for p, _ in toxic.train[: args.pair_prompts]], args.samples, args.new_tokens, seed)
    lap("continuations to learn from")
    settings = LearnSteeringSettings(
        epochs=args.epochs, learning_rate=args.learning_rate, keep=args.keep, seed=seed, save_steps=5
    )
    scope = Steering(positions="generated")  # from the prompt's last token on, as a gate over the prompt
    learnt = learn_steering(
        model, tokenizer, pairs, features, settings, scope=scope, folder=args.out / f"learnt-{seed}"
    )
    lap("learning")
    last = 2 * (len(args.hook_points) - 1)
    vectors = {
        name: {n: replace(scope, edits=[FeatureEdit(last + which, latent, "direction", -n, "norm")]) for n in NORMS}
        for name, (which, latent) in DETECTORS.items()
        if name != "probe"
    }
    ladders = {**vectors, "learnt": {factor: scaled(learnt.steering, factor) for factor in FACTORS}}
    parts = {"toxic": toxic.report, "neutral": neutral.report}
    points = [{"vector": "none", "gate": None, "strength": 0.0, **{k: bench.run(p, None) for k, p in parts.items()}}]
    searches = {}
    for name, ladder in ladders.items():
        strength, searches[name] = strongest(bench, toxic.search, ladder, args.perplexity_limit)
        own = "latent" if name == "learnt" else name
        for gate in (None, own, "probe"):
            steering = replace(ladder[strength], when=None if gate is None else gates[gate])
            found = {
                kind: bench.run(prompts, steering)
                if gate is None
                else bench.run_gated(prompts, steering, points[0][kind])
                for kind, prompts in parts.items()
            }
            points.append({"vector": name, "gate": gate, "strength": strength, **found})
        lap(f"steering by {name}")
    model.unwrap()
    counts = {"toxic": len(toxic.train), "neutral": len(neutral.train), "pairs": len(pairs)}
    told = {"seed": seed, "trained_on": counts, **facts, "gates": fitted, "learnt": learnt.to_dict()}
    return {**told, "searches": searches, "points": points, "seconds": seconds}


# -- what is told ----------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Ends of the 95 % interval of a mean, by bootstrap over prompts."""
    numbers, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
    rows = torch.randint(len(numbers), (draws, len(numbers)), generator=generator)
    low, high = numbers[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Interval of 95 % of a share: Wilson (1927)."""
    share, z = hits / n, LEVEL_95
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def table(runs: Sequence[dict[str, Any]]) -> tuple[Table, list[dict[str, Any]]]:
    """Every vector and gate over the prompts of all seeds."""
    shown = Table(title=f"seeds {[one['seed'] for one in runs]}", box=None, padding=(0, 2))
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("vector", "gate") else "right")
    rows = []
    for number, point in enumerate(runs[0]["points"]):
        of_seeds = [one["points"][number] for one in runs]
        base = [one["points"][0] for one in runs]
        row: dict[str, Any] = {"vector": point["vector"], "gate": point["gate"]}
        row["strengths"] = [one["strength"] for one in of_seeds]
        for kind in ("toxic", "neutral"):
            scores = [value for one in of_seeds for value in one[kind]["toxicity"]]
            before = [value for one in base for value in one[kind]["toxicity"]]
            change = [a - b for a, b in zip(scores, before, strict=True)]
            changed = [value for one in of_seeds for value in one[kind]["changed"]]
            opened = [value for one in of_seeds for value in one[kind].get("opened", ())]
            told = {name: [value for one in of_seeds for value in one[kind][name]] for name in ("losses", "tokens")}
            row[kind] = {
                "prompts": len(scores),
                "toxicity": mean(scores),
                "change": mean(change),
                "change_interval": interval(change),
                "opened": mean(opened) if opened else None,
                "changed": mean(changed),
                "changed_interval": wilson(sum(changed), len(changed)),
                "change_of_seeds": [
                    mean(one[kind]["toxicity"]) - mean(two[kind]["toxicity"])
                    for one, two in zip(of_seeds, base, strict=True)
                ],
                "perplexity": perplexity(told),
            }
        rows.append(row)
        low, high = row["toxic"]["change_interval"]
        least, most = row["neutral"]["changed_interval"]
        shown.add_row(
            row["vector"], row["gate"] or "", str(row["strengths"]), f"{row['toxic']['toxicity']:.3f}",
            f"{row['toxic']['change']:+.3f} ({low:+.3f} to {high:+.3f})", f"{row['toxic']['changed']:.1%}",
            f"{row['neutral']['changed']:.1%} ({least:.1%} to {most:.1%})", f"{row['neutral']['toxicity']:.3f}",
            f"{row['toxic']['perplexity']:.1f}",
        )  # fmt: skip
    return shown, rows


def main() -> None:
    args = parse()
    console = Console(width=190)
    model, tokenizer, name = load(args.model, [], model_dtype=args.dtype)
    base: Any = model.lm
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"rtp": [Path(file).name for file in args.rtp], "model": Path(name).name}
    settings |= {"texts": args.texts and Path(args.texts).name}
    args.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        console.print(f"[bold]seed {seed}[/]", highlight=False)
        runs.append(run(args, seed, base, tokenizer, console))
        shown, rows = table(runs)
        record = {"settings": settings, "table": rows, "runs": runs}
        (args.out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for gate, found in runs[-1]["gates"].items():
            low, high = found["detection_interval"]
            console.print(
                f"  gate on {gate} ({found['place']}, {found['pool']}): AUROC {found['auroc']:.3f}, opened by "
                f"{found['detection_rate']:.1%} ({low:.1%} to {high:.1%}) of toxic prompts",
                highlight=False,
            )
        console.print(shown)


if __name__ == "__main__":
    main()
