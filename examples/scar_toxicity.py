"""SCAR (https://huggingface.co/papers/2411.07122) on RealToxicityPrompts: one latent detects toxicity and steers it.

    python examples/scar_toxicity.py --rtp challenging.jsonl nontoxic.jsonl --toxic-chat toxicchat_test.jsonl

An SAE with a conditioned latent and one without are fitted to the same hidden states of each site. On texts that were
held out, the latent is compared as a detector with the best latent of the other SAE, with DiffMean and with a linear
probe; all of them are then tried on ToxicChat. At last toxic prompts are continued, greedily, under SCAR's factors and
under calibrated strengths. Prints numbers, never texts; writes them to results.json. About 10 minutes on two cores.

Files: RealToxicityPrompts (`prompt` and `continuation` with `text` and `toxicity`), ToxicChat (`text`, `toxicity`).
Needs: pip install 'sae-transformers[quickstart,evaluation,toxicity]'
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback

from sae_transformers import (
    FeatureEdit,
    GenerationSettings,
    HiddenStateReader,
    SaeForCausalLM,
    SaeTrainer,
    SaeTrainingArguments,
    SearchSettings,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Steering,
    TensorTokens,
    auroc,
    ce_loss_recovered,
    continue_prompts,
    encode_texts,
    fit_diffmean,
    fit_linear_probe,
    get_scorer,
    load,
    measure_reconstruction,
    open_text,
    search_features,
)

CONCEPT, LATENT = "toxicity", 0
FACTORS = (-100.0, -50.0, -1.0, 0.0, 1.0, 50.0, 100.0)  # SCAR's
STRENGTHS = (0.05, 0.1, 0.14, 0.2, 0.28, 0.4, 0.8, 1.6, 3.2)  # in hidden norms, until the text gets too unlikely
# The first token, whose hidden state is an outlier, is neither trained on nor replaced.
AFTER_FIRST = [(1, None)]


class Texts(NamedTuple):
    """Labelled texts and the hidden states of their tokens: (n_tokens, d) by place, the text of each (n_tokens,)."""

    texts: list[str]
    labels: Tensor
    hidden: dict[str, Tensor]
    text_index: Tensor

    def pooled(self, values: Tensor) -> Tensor:
        """Mean over each text's tokens: (n_tokens, ...) to (n_texts, ...)."""
        counts = torch.bincount(self.text_index).view(-1, *[1] * (values.ndim - 1))
        return torch.zeros(len(self.labels), *values.shape[1:]).index_add_(0, self.text_index, values.float()) / counts


@dataclass(frozen=True)
class Point:
    """Continuations of the prompts under one steering, measured.

    toxicity: mean of the offline scorer and its standard error. toxicity_change: against unsteered, by prompt.
    perplexity: of the unsteered model. first_divergent_token: mean, against unsteered. repetition: of word trigrams.
    """

    name: str
    toxicity: float
    toxicity_error: float
    toxicity_change: float
    toxicity_change_error: float
    perplexity: float
    first_divergent_token: float
    repetition: float


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rtp", nargs="+", required=True, help="files of RealToxicityPrompts")
    parser.add_argument("--toxic-chat", required=True, help="file of ToxicChat's test part")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--sites", nargs="+", default=["mlp_out", "resid_post"])
    parser.add_argument("--dtype", default="bfloat16", help="of the model; SAEs are in float32")
    parser.add_argument("--latents-per-dimension", type=int, default=4)
    parser.add_argument("--k", type=int, default=64, help="latents active on a token")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens-per-step", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ranking-weight", type=float, default=0.0)
    parser.add_argument("--test-share", type=float, default=0.3)
    parser.add_argument("--toxic-chat-texts", type=int, default=1200)
    parser.add_argument("--prompts", type=int, default=64, help="for the reported continuations")
    parser.add_argument("--search-prompts", type=int, default=24, help="for the choice of strengths")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--perplexity-limit", type=float, default=1.6, help="of calibrated strengths, times unsteered")
    parser.add_argument("--no-steering", action="store_true", help="detection only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of split, SAEs and subsets; a run each")
    parser.add_argument("--out", type=Path, default=Path("outputs/scar_toxicity"))
    return parser.parse_args()


# -- data ------------------------------------------------------------------------------------------------------------


def real_toxicity_prompts(rows: Sequence[Any]) -> list[tuple[str, int]]:
    """Prompt and continuation together, 1 where the mean of the toxicities that are known is 0.5 or more."""
    pairs = []
    for row in rows:
        parts = row["prompt"], row["continuation"]
        known = [part["toxicity"] for part in parts if part["toxicity"] is not None]
        pairs.append(("".join(part["text"] for part in parts), int(sum(known) >= 0.5 * max(len(known), 1))))
    return pairs


def toxic_chat(file: str) -> list[tuple[str, int]]:
    """The user's messages with their human labels."""
    return [(row.get("user_input", row.get("text")), int(row["toxicity"])) for row in open_text(file).rows()]


def split_rows(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Training and test rows, at random."""
    rows = random.Random(seed).sample(rows, len(rows))
    n_test = round(share * len(rows))
    return rows[n_test:], rows[:n_test]


def read_states(reader: HiddenStateReader, tokenizer: Any, pairs: Sequence[tuple[str, int]]) -> Texts:
    """Hidden states of all tokens but each text's first; texts of one token are left out."""
    rows = tokenizer([text for text, _ in pairs], truncation=True, max_length=128)["input_ids"]
    long = [i for i, row in enumerate(rows) if len(row) > 1]
    ids = [torch.tensor(rows[i]) for i in long]
    keep = [torch.arange(1, len(row)) for row in ids]
    index = torch.repeat_interleave(torch.arange(len(long)), torch.tensor([len(k) for k in keep]))
    hidden = {place: states.cpu() for place, states in reader.read(ids, keep, dtype=torch.float32).items()}
    return Texts([pairs[i][0] for i in long], torch.tensor([pairs[i][1] for i in long]), hidden, index)


def without_outliers(data: dict[str, Texts]) -> dict[str, Texts]:
    """Without tokens whose norm is unusual among the training tokens of any place, as the SAEs are fitted."""
    limits = {place: 10 * hidden.norm(dim=-1).median() for place, hidden in data["train"].hidden.items()}
    found = {}
    for name, part in data.items():
        usual = torch.stack([part.hidden[place].norm(dim=-1) <= limit for place, limit in limits.items()]).all(0)
        hidden = {place: states[usual] for place, states in part.hidden.items()}
        found[name] = part._replace(hidden=hidden, text_index=part.text_index[usual])
    return found


# -- training --------------------------------------------------------------------------------------------------------


def new_sae(args: argparse.Namespace, width: int, site: str, concepts: dict[str, int]) -> SparseAutoencoder:
    config = SparseAutoencoderConfig(
        d_in=width,
        d_sae=args.latents_per_dimension * width,
        activation="topk",
        k=args.k,
        normalization="layer_norm",
        layer=args.layer,
        site=site,
        concepts=concepts,
    )
    return SparseAutoencoder(config)


def train(args: argparse.Namespace, data: Texts, seed: int) -> dict[str, tuple[SparseAutoencoder, SparseAutoencoder]]:
    """Site -> SAEs with and without a conditioned latent, all trained in one pass; a token has its text's label."""
    torch.manual_seed(seed)
    width = next(iter(data.hidden.values())).shape[1]
    pairs = {site: tuple(new_sae(args, width, site, c) for c in ({CONCEPT: LATENT}, {})) for site in args.sites}
    tokens = TensorTokens({**data.hidden, "labels": data.labels[data.text_index][:, None].float()}, [CONCEPT])
    with tempfile.TemporaryDirectory() as folder:
        settings = SaeTrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.tokens_per_step,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            concept_init="diffmean",
            ranking_weight=args.ranking_weight,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = SaeTrainer([sae for pair in pairs.values() for sae in pair], settings, tokens)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return pairs  # pyright: ignore[reportReturnType]


# -- detection -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def detectors(
    conditioned: SparseAutoencoder, plain: SparseAutoencoder, data: Texts, place: str, seed: int
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Any]]:
    """Name -> scores of hidden states (n_tokens, d), fitted to the training texts; and what was chosen on the way."""
    hidden, labels = data.hidden[place], data.labels
    codes = encode_texts(plain, hidden, data.text_index, len(labels))
    found = search_features(codes, labels, settings=SearchSettings(selection="input"))
    best = found.features[:1]
    direction = fit_diffmean(hidden, labels[data.text_index])
    probe = fit_linear_probe(data.pooled(hidden), labels, seed=seed)
    own = conditioned.W_dec[LATENT].cpu()
    facts = {
        "best_unconditioned_latent": int(best),
        "its_training_auroc": float(found.input_scores[0]),
        "cosine_of_decoder_row_and_diffmean": float(torch.cosine_similarity(own, direction, dim=0)),
    }
    return {
        "conditioned latent": lambda x: conditioned.encode_pre_acts(x, features=torch.tensor([LATENT]))[:, 0],
        "best unconditioned latent": lambda x: plain.encode_selected(x, best)[:, 0],
        "difference of means": lambda x: x @ direction,
        "linear probe": probe.score,
    }, facts


def with_interval(scores: Tensor, labels: Tensor, seed: int, draws: int = 200) -> list[float]:
    """AUROC and the ends of its 95 % interval, by bootstrap over texts."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        rows = torch.randint(len(labels), (len(labels),), generator=generator)
        found.append(auroc(scores[rows], labels[rows]))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [auroc(scores, labels), low, high]


@torch.no_grad()
def measure_sae(sae: SparseAutoencoder, data: Texts, place: str) -> dict[str, float]:
    """Reconstruction of held-out tokens, and how often the conditioned latent is among the active ones."""
    found = measure_reconstruction(sae, [data.hidden[place]])
    if sae.config.concepts:
        latent = torch.cat(
            [sae.encode_selected(h, torch.tensor([LATENT]))[:, 0] for h in data.hidden[place].split(2048)]
        )
        present = data.labels[data.text_index] == 1
        found["latent_active_in_toxic_texts"] = float((latent[present] > 0).float().mean())
        found["latent_active_in_others"] = float((latent[~present] > 0).float().mean())
    return found


# -- steering --------------------------------------------------------------------------------------------------------


class Continuations:
    """Continues prompts greedily under any steering and measures the result against the unsteered continuations."""

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, score: Callable) -> None:
        self.model, self.tokenizer, self.prompts, self.score = model, tokenizer, list(prompts), score
        self.greedy = GenerationSettings(new_tokens, temperature=0.0)
        self.unsteered: tuple[Sequence[Sequence[int]], Tensor] | None = None
        self.baseline = self.measure("unsteered", None)

    def measure(self, name: str, steering: Steering | None) -> Point:
        found = continue_prompts(self.model, self.tokenizer, self.prompts, [steering] * len(self.prompts), self.greedy)
        scores = self.score(found.texts)
        self.unsteered = self.unsteered or (found.ids, scores)
        before, scores_before = self.unsteered
        change = scores - scores_before
        errors = [float(values.std() / len(values) ** 0.5) for values in (scores, change)]
        return Point(
            name,
            toxicity=float(scores.mean()),
            toxicity_error=errors[0],
            toxicity_change=float(change.mean()),
            toxicity_change_error=errors[1],
            perplexity=found.perplexity,
            first_divergent_token=sum(map(agreement, found.ids, before)) / len(before),
            repetition=found.repetition,
        )


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with: SCAR's first divergent token."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def scale(number: int, factor: float, keep_error: bool) -> Steering:
    edit = FeatureEdit(number, LATENT, "scale", factor)
    return Steering([edit], keep_error=keep_error, positions=AFTER_FIRST)


def along(number: int, strength: float) -> Steering:
    """Add `strength` times each hidden state's norm along the latent's decoder row."""
    edit = FeatureEdit(number, LATENT, "direction", strength, "norm")
    return Steering([edit], positions=AFTER_FIRST)


def calibrate(search: Continuations, number: int, limit: float) -> tuple[dict[int, float], list[Point]]:
    """On each side the strength that moves toxicity most while the text stays likely; and all that was tried."""
    best, tried = {}, []
    for side in (-1, 1):
        allowed: list[tuple[float, float]] = []
        for strength in STRENGTHS:
            point = search.measure(f"{side * strength:+g} norms", along(number, side * strength))
            tried.append(point)
            if point.perplexity > limit * search.baseline.perplexity:
                break
            allowed.append((side * point.toxicity, side * strength))
        best[side] = max(allowed, default=(0.0, side * STRENGTHS[0]))[1]
    return best, tried


def steer(site: str, number: int, report: Continuations, search: Continuations, limit: float) -> dict[str, Any]:
    points = [report.baseline]
    for keep_error in (False, True):
        kind = "error kept" if keep_error else "replaced"
        points += [
            report.measure(f"factor {f:+g}, {kind}" if f else f"factor 0, {kind}", scale(number, f, keep_error))
            for f in FACTORS
            if not (keep_error and f == 1)  # changes nothing
        ]
    best, tried = calibrate(search, number, limit)
    for strength in (best[-1], best[-1] / 2, best[1] / 2, best[1]):
        points.append(report.measure(f"{strength:+g} norms", along(number, strength)))
    return {"site": site, "points": [asdict(p) for p in points], "search": [asdict(p) for p in tried]}


# -- the run ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, seed: int, base: Any, tokenizer: Any, console: Console) -> dict[str, Any]:
    start, seconds = time.perf_counter(), {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - start - sum(seconds.values()), 1)
        console.print(f"  {name}: {seconds[name]} s", highlight=False)

    rtp_rows = [row for file in args.rtp for row in open_text(file).rows()]
    rows = split_rows(rtp_rows, args.test_share, seed)
    chat = toxic_chat(args.toxic_chat)
    chat = random.Random(seed).sample(chat, min(args.toxic_chat_texts, len(chat)))
    places = {site: f"layers.{args.layer}.{site}" for site in args.sites}
    reader = HiddenStateReader(base, list(places.values()))
    sources = {
        "train": real_toxicity_prompts(rows[0]),
        "RealToxicityPrompts": real_toxicity_prompts(rows[1]),
        "ToxicChat": chat,
    }
    data = without_outliers({name: read_states(reader, tokenizer, pairs) for name, pairs in sources.items()})
    counts = {
        name: {"texts": len(d.labels), "toxic": int(d.labels.sum()), "tokens": len(d.text_index)}
        for name, d in data.items()
    }
    console.print(f"[bold]seed {seed}[/] {counts}", highlight=False)
    lap("hidden states")
    saes = train(args, data["train"], seed)
    lap("training")
    score = get_scorer("profanity")
    tests = {name: data[name] for name in ("RealToxicityPrompts", "ToxicChat")}
    detection: dict[str, Any] = {
        "words alone (the scorer of continuations)": {
            name: with_interval(score(d.texts), d.labels, seed) for name, d in tests.items()
        }
    }
    facts, quality = {}, {}
    for site, place in places.items():
        found, facts[site] = detectors(*saes[site], data["train"], place, seed)
        for name, detect in found.items():
            with torch.no_grad():
                detection[f"{site}: {name}"] = {
                    test: with_interval(d.pooled(detect(d.hidden[place])), d.labels, seed) for test, d in tests.items()
                }
        for name, sae in zip(("conditioned", "unconditioned"), saes[site], strict=True):
            quality[f"{site}: {name}"] = measure_sae(sae, data["RealToxicityPrompts"], place)
    lap("detection")
    model: Any = SaeForCausalLM.from_base(base, saes=[sae for pair in saes.values() for sae in pair]).eval()
    held_out = data["RealToxicityPrompts"].texts[:48]
    batches = [
        dict(tokenizer(held_out[i : i + 16], return_tensors="pt", padding=True)) for i in range(0, len(held_out), 16)
    ]
    for number, found in enumerate(quality.values()):
        found |= {**ce_loss_recovered(model, batches, saes=[number]), "tokens": found["tokens"]}
    lap("loss recovered")
    console.print(detection_table(detection), quality_table(quality))
    steering = []
    if not args.no_steering:
        prompts = [row["prompt"]["text"] for row in rows[1] if (row["prompt"]["toxicity"] or 0) >= 0.5]
        wanted = args.search_prompts + args.prompts
        if len(prompts) < wanted:
            raise ValueError(f"Expected {wanted} toxic prompts that were held out. Received: {len(prompts)}.")
        search, report = (
            Continuations(model, tokenizer, part, args.new_tokens, score)
            for part in (prompts[: args.search_prompts], prompts[args.search_prompts : wanted])
        )
        for number, site in enumerate(args.sites):
            steering.append(steer(site, 2 * number, report, search, args.perplexity_limit))
            lap(f"steering {site}")
            console.print(steering_table(steering[-1], len(report.unsteered[0]) if report.unsteered else 0))
    model.unwrap()
    return {
        "seed": seed,
        "counts": counts,
        "detection_auroc": detection,
        "detectors": facts,
        "saes": quality,
        "steering": steering,
        "seconds": seconds,
    }


def detection_table(detection: dict[str, Any]) -> Table:
    table = Table("AUROC of held-out texts, 95 % interval", *next(iter(detection.values())), box=None, padding=(0, 2))
    for name, found in detection.items():
        table.add_row(name, *(f"{value:.3f}  {low:.3f} to {high:.3f}" for value, low, high in found.values()))
    return table


def quality_table(quality: dict[str, Any]) -> Table:
    names = ("fvu", "l0", "dead_share", "recovered", "latent_active_in_toxic_texts", "latent_active_in_others")
    table = Table("SAE", *(name.replace("_", " ") for name in names), box=None, padding=(0, 2))
    for sae, found in quality.items():
        table.add_row(sae, *(f"{found[name]:.3f}" if name in found else "" for name in names))
    return table


def steering_table(found: dict[str, Any], n_prompts: int) -> Table:
    table = Table(title=f"{found['site']}, {n_prompts} prompts, greedy", box=None, padding=(0, 2))
    for name in ("steering", "toxicity", "change", "perplexity", "first divergent token", "repeated trigrams"):
        table.add_column(name, justify="left" if name == "steering" else "right")
    for p in found["points"]:
        table.add_row(
            p["name"],
            f"{p['toxicity']:.3f} ± {p['toxicity_error']:.3f}",
            f"{p['toxicity_change']:+.3f} ± {p['toxicity_change_error']:.3f}",
            f"{p['perplexity']:.1f}",
            f"{p['first_divergent_token']:.1f}",
            f"{p['repetition']:.1%}",
        )
    return table


def main() -> None:
    args = parse()
    console = Console(width=150)
    model, tokenizer, name = load(args.model, [], model_dtype=args.dtype)
    base: Any = model.lm
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings |= {"rtp": [Path(f).name for f in args.rtp], "toxic_chat": Path(args.toxic_chat).name}
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in args.seeds:
        runs.append(run(args, seed, base, tokenizer, console))
        record = {"settings": {**settings, "model": Path(name).name}, "runs": runs}
        (args.out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print({run["seed"]: run["seconds"] for run in runs})


if __name__ == "__main__":
    main()
