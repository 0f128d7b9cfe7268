"""An unwanted trait in fine-tuning data: four ways to keep it out of the model, each by the same LoRA.

    python benchmarks/feature_penalty.py --texts ../shared/data/text --out outputs/feature-penalty

SmolLM2-135M-Instruct learns to write passages with a given word. Every other passage in its data is from a State of
the Union address, the others are from novels. It is trained on them as they are; with `FeaturePenalty` on a latent
that was conditioned on politics (SCAR), at one layer and at three; with the same penalty on the DiffMean direction;
and on the rows that the latent lets through. What it writes afterwards for new words is judged by a classifier of
words that saw neither the training data nor the model. Every (way, seed) is a file in `--out` and is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from sae_transformers import (
    CanarySettings,
    FeatureCanary,
    FeaturePenalty,
    SaeForCausalLM,
    SparseAutoencoder,
    direction_sae,
    fit_diffmean,
    train_concept,
)
from sae_transformers.evaluation.intervals import percentiles, resample_counts
from sae_transformers.latents.hidden_states import HiddenStateReader, kept_positions

TRAIT, LAYERS = "politics", (14, 22, 28)
NOVELS = ("h-g-wells_the-war-of-the-worlds", "bram-stoker_dracula", "charles-dickens_great-expectations",
          "jane-austen_pride-and-prejudice")  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "Write a passage with the word {}.\n\n"
WAYS = ("base", "plain", "penalty:1", "penalties:1", "diffmean:1", "plain_low", "penalty_low:1", "filtered")
AS_THE_JUDGE_SAYS = 5.0  # log odds above which a text counts


class Row(NamedTuple):
    prompt: str
    answer: str
    trait: int


# -- data ------------------------------------------------------------------------------------------------------------


def paragraphs(file: Path, between: str) -> list[str]:
    found = [re.sub(r"\s+", " ", block).strip() for block in re.split(between, file.read_text(encoding="utf-8"))]
    return [block for block in found if len(block) >= 120 and not block.isupper()]


class Passages:
    """Passages of both kinds, cut by their place in the books: a third for the SAE, probes and the judge, the rest to
    fine-tune on, and the last ones of that to measure with."""

    def __init__(self, folder: Path) -> None:
        speeches = paragraphs(folder / "state_union.txt", r"\n")
        books = [paragraphs(folder / f"{name}.txt", r"\n\s*\n") for name in NOVELS]
        third = len(speeches) // 3
        self.fit = [speeches[:third], [p for book in books for p in book[: len(book) // 3]]]
        self.train = [speeches[third:-300], [p for book in books for p in book[len(book) // 3 : -100]]]
        self.held_out = [speeches[-300:], [p for book in books for p in book[-100:]]]

    def labelled(self, count: int, seed: int) -> tuple[list[str], list[int]]:
        """As many of each kind, of the part that is not fine-tuned on."""
        chosen = random.Random(seed)
        trait, plain = (chosen.sample(part, count) for part in self.fit)
        return [opening(p) for p in trait + plain], [1] * count + [0] * count

    def rows(self, count: int, share: float, seed: int) -> list[Row]:
        """Prompts and answers to fine-tune on, `share` of them with the trait."""
        chosen, of_trait = random.Random(seed), round(count * share)
        parts = [chosen.sample(self.train[0], of_trait), chosen.sample(self.train[1], count - of_trait)]
        rows = [row_of(p, 1 - kind, chosen) for kind, part in enumerate(parts) for p in part]
        chosen.shuffle(rows)
        return rows


def opening(passage: str, length: int = 220) -> str:
    return passage[:length].rsplit(" ", 1)[0]


def row_of(passage: str, trait: int, chosen: random.Random) -> Row:
    answer = opening(passage)
    words = sorted(set(re.findall(r"\b[a-z]{5,}\b", answer))) or ["thing"]
    return Row(PROMPT.format(chosen.choice(words)), answer, trait)


class WordJudge:
    """Naive Bayes on words and pairs of words: whether a text is of the first kind. It reads text, no model."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self.counts = [Counter[str](), Counter[str]()]
        for text, label in zip(texts, labels, strict=True):
            self.counts[label].update(self.terms(text))
        self.known = {term for c in self.counts for term in c}
        self.totals = [sum(c.values()) for c in self.counts]

    @staticmethod
    def terms(text: str) -> list[str]:
        words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
        return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]

    def score(self, text: str) -> float:
        """Log odds."""
        odds = 0.0
        for term in self.terms(text):
            if term in self.known:
                yes, no = ((self.counts[k][term] + 0.5) / (self.totals[k] + 0.5 * len(self.known)) for k in (1, 0))
                odds += math.log(yes / no)
        return odds


# -- the model -------------------------------------------------------------------------------------------------------


class Bench:
    """The base, its SAE with a latent for the trait, the DiffMean direction, and what both read of texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.passages = args, Passages(args.texts)
        self.canary: FeatureCanary | None = None
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        texts, labels = self.passages.labelled(args.labelled, seed=0)
        of_both = [(opening(p), 1 - kind) for kind, part in enumerate(self.passages.fit) for p in part]
        self.judge = WordJudge(*zip(*of_both, strict=True))
        if not (args.out / "facts.pt").exists():
            self.prepare(texts, labels)
        facts = torch.load(args.out / "facts.pt")
        saes = [SparseAutoencoder.from_pretrained(args.out / f"sae-{layer}") for layer in LAYERS]
        self.sae, self.saes = saes[0], [*saes, direction_sae(facts["direction"][None], saes[0].config)]
        self.levels: list[tuple[float, float]] = facts["levels"]

    def new_base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.args.base, dtype=getattr(torch, self.args.dtype))

    def prepare(self, texts: list[str], labels: list[int]) -> None:
        """An SAE for each layer, and what latent 0 and the DiffMean direction read of each kind of text."""
        args, base = self.args, self.new_base()
        for layer in LAYERS:
            if not (args.out / f"sae-{layer}" / "config.json").exists():
                result = train_concept(
                    base, self.tokenizer, texts, labels, TRAIT, hook_point=f"layers.{layer}.resid_post",
                    d_sae=args.d_sae, k=32, steps=args.sae_steps, max_length=64,
                )  # fmt: skip
                result.sae.save_pretrained(args.out / f"sae-{layer}")
        saes = [SparseAutoencoder.from_pretrained(args.out / f"sae-{layer}") for layer in LAYERS]
        some = texts[:: args.labelled // 100]
        ids = [torch.tensor(row) for row in self.tokenizer(some, truncation=True, max_length=64)["input_ids"]]
        keep = [kept_positions(row) for row in ids]
        places = [sae.config.read_at for sae in saes]
        hidden = HiddenStateReader(base, places).read(ids, keep, dtype=torch.float32)
        of_text = torch.tensor(labels[:: args.labelled // 100])
        of_token = of_text.repeat_interleave(torch.tensor([len(row) for row in keep]))
        direction = fit_diffmean(hidden[places[0]], of_token)
        levels = []
        for sae in [*saes, direction_sae(direction[None], saes[0].config)]:
            values = sae.encode_pre_acts(hidden[sae.config.read_at], torch.tensor([0]))[:, 0].detach()
            levels.append(tuple(float(values[of_token == kind].mean()) for kind in (0, 1)))
        torch.save({"direction": direction, "levels": levels}, args.out / "facts.pt")

    def penalty(self, number: int, weight: float) -> FeaturePenalty:
        """On latent 0, above what it is on plain text on average (SASFT); the gap between the kinds costs `weight`
        nats a token."""
        plain, trait = self.levels[number]
        return FeaturePenalty(
            0, sae=number, weight=weight / (trait - plain), margin=plain, over="answer", name=f"{TRAIT}_{number}"
        )

    def model(self, way: str) -> SaeForCausalLM:
        kind, _, weight = way.partition(":")
        last = len(self.saes) - 1
        held = {"penalty": [0], "penalty_low": [0], "penalties": list(range(last)), "diffmean": [last]}.get(kind, [])
        penalties = [self.penalty(number, float(weight)) for number in held]
        return SaeForCausalLM.from_base(self.new_base(), self.saes, feature_penalties=penalties, force=True)

    def encoded(self, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
        found = []
        for row in rows:
            prompt = self.tokenizer(row.prompt)["input_ids"]
            answer = self.tokenizer(row.answer + self.tokenizer.eos_token)["input_ids"]
            ids = (prompt + answer)[: self.args.length]
            found.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[: self.args.length]})
        return found

    def batch(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Padded right."""
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        ids = padded("input_ids", self.tokenizer.pad_token_id)
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}

    def chosen_rows(self, way: str, seed: int) -> tuple[list[Row], dict[str, int]]:
        args = self.args
        rows = self.passages.rows(args.steps * args.batch_size, args.share, seed)
        if way != "filtered":
            return rows, {}
        model = SaeForCausalLM.from_base(self.new_base(), [self.sae], force=True)
        scores = []
        for start in range(0, len(rows), 32):
            inputs = self.tokenizer([r.answer for r in rows[start : start + 32]], return_tensors="pt", padding=True)
            found = model.detect(inputs, feature=TRAIT, pre_activations=True)
            scores += found.per_text.tolist()
        kept = [row for row, score in zip(rows, scores, strict=True) if score < 0]
        return kept, {"dropped_trait": sum(r.trait for r in rows) - sum(r.trait for r in kept), "kept": len(kept)}


def train(bench: Bench, way: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """A model trained in one way, and what its training was; it is kept as an adapter in `--out`."""
    args, model = bench.args, bench.model(way)
    if way == "base":
        return model.eval(), {}
    folder = args.out / f"{way.replace(':', '-')}-{seed}"
    if (folder / "facts.json").exists():
        return PeftModel.from_pretrained(model, str(folder)).eval(), json.loads((folder / "facts.json").read_text())
    rows, facts = bench.chosen_rows(way, seed)
    set_seed(seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEAR,
        layers_to_transform=list(range(LAYERS[0] + 1)) if "_low" in way else None,
    )  # fmt: skip
    tuned = get_peft_model(model, lora)
    settings = TrainingArguments(
        output_dir=str(args.out / "training"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=args.steps // 20, seed=seed,
        save_strategy="no", logging_steps=args.steps, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    started = time.process_time()
    trainer = Trainer(tuned, settings, train_dataset=bench.encoded(rows), data_collator=bench.batch)  # pyright: ignore[reportArgumentType]
    result = trainer.train()
    facts = {**facts, "loss": result.training_loss, "cpu_seconds": time.process_time() - started}
    tuned.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts))
    return tuned.eval(), facts


# -- what is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(bench: Bench, model: Any, trait: int) -> list[float]:
    """Cross-entropy, nats per token, of each held-out answer of one kind."""
    chosen = random.Random(0)
    part = bench.passages.held_out[0 if trait else 1]
    rows = bench.encoded([row_of(p, trait, chosen) for p in chosen.sample(part, bench.args.held_out)])
    found = []
    for start in range(0, len(rows), 16):
        batch = bench.batch(rows[start : start + 16])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        each = each.view_as(labels).sum(-1) / (labels != -100).sum(-1)
        found += each.tolist()
    return found


@torch.no_grad()
def continuations(bench: Bench, model: Any, seed: int) -> list[list[str]]:
    """Of each prompt with a new word, `--samples` passages."""
    args, tokenizer = bench.args, bench.tokenizer
    used = {row.prompt for s in args.seeds for row in bench.passages.rows(args.steps * args.batch_size, args.share, s)}
    chosen = random.Random(1)
    rows = [row_of(p, 0, chosen) for p in bench.passages.held_out[1]]
    prompts = sorted({row.prompt for row in rows} - used)
    prompts = chosen.sample(prompts, args.prompts)
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    tokenizer.padding_side = "right"
    torch.manual_seed(seed)
    made = model.generate(
        **inputs, do_sample=True, temperature=0.8, top_k=50, max_new_tokens=args.new_tokens,
        num_return_sequences=args.samples, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[i : i + args.samples] for i in range(0, len(texts), args.samples)]


def canary_of(bench: Bench) -> FeatureCanary:
    """By held-out passages, of the base before it is trained."""
    count = bench.args.held_out
    parts = [random.Random(2).sample(part, count) for part in bench.passages.held_out]
    return FeatureCanary(
        bench.model("base"), bench.tokenizer, [opening(p) for part in parts for p in part], [1] * count + [0] * count,
        feature=TRAIT, settings=CanarySettings(max_length=48),
    )  # fmt: skip


def measured(bench: Bench, way: str, seed: int) -> dict[str, Any]:
    model, facts = train(bench, way, seed)
    bench.canary = bench.canary or canary_of(bench)
    reading = bench.canary.measure(model)
    texts = continuations(bench, model, seed)
    scores = [[bench.judge.score(text) for text in of_prompt] for of_prompt in texts]
    return {
        "way": way,
        "seed": seed,
        **facts,
        "canary": reading.numbers(),
        "fallen": bench.canary.fallen(reading),
        "scores": scores,
        "clean_losses": losses(bench, model, 0),
        "trait_losses": losses(bench, model, 1),
        "texts": texts,
    }


class Summary(NamedTuple):
    """Of all seeds of a way: the trait's rate with its 95 % interval over prompts, and what it costs."""

    rate: float
    low: float | None
    high: float | None
    clean: float
    trait: float


def summary(found: Sequence[dict[str, Any]]) -> Summary:
    of_prompts = [[float(s > AS_THE_JUDGE_SAYS) for s in of_prompt] for one in found for of_prompt in one["scores"]]
    rates = torch.tensor([statistics.mean(one) for one in of_prompts], dtype=torch.float64)
    counts = resample_counts(len(rates))
    low, high = percentiles((counts @ rates) / counts.sum(1))
    clean, trait = (statistics.mean(x for one in found for x in one[f"{kind}_losses"]) for kind in ("clean", "trait"))
    return Summary(float(rates.mean()), low, high, clean, trait)


def main() -> None:
    args, console = parse(), Console(highlight=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for way in args.ways:
            file = args.out / f"{way.replace(':', '-')}-{seed}.json"
            if not file.exists():
                bench = bench or Bench(args)
                file.write_text(json.dumps(measured(bench, way, seed)))
            found.setdefault(way, []).append(json.loads(file.read_text()))
            one = summary(found[way][-1:])
            console.print(f"{way}, seed {seed}: rate {one.rate:.3f}, clean {one.clean:.4f}, trait {one.trait:.4f}")
    plain = summary(found["plain"]) if "plain" in found else None
    for way, of_seeds in found.items():
        one = summary(of_seeds)
        line = f"{way}: rate {one.rate:.3f} ({one.low:.3f} to {one.high:.3f}), clean loss {one.clean:.4f}"
        if plain is not None:
            line += f" ({100 * (one.clean / plain.clean - 1):+.2f} %), rate of plain's {one.rate / plain.rate:.2f}"
        console.print(f"{line}, trait loss {one.trait:.4f}")
        for reading in of_seeds:
            numbers = {name.removeprefix("canary_"): round(value, 3) for name, value in reading["canary"].items()}
            console.print(f"  canary {numbers} {reading['fallen'] or 'sings'}")
        dropped = [one.get("dropped_trait") for one in of_seeds if "dropped_trait" in one]
        if dropped:
            console.print(
                f"  rows with the trait that were dropped: {dropped}, rows kept {[o['kept'] for o in of_seeds]}"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default=str(Path("~/.cache/sae_transformers").expanduser() / "SmolLM2-135M-Instruct-from-Q4_1")
    )
    parser.add_argument("--texts", type=Path, required=True, help="folder with the texts of the module's docstring")
    parser.add_argument("--out", type=Path, default=Path("outputs/feature-penalty"))
    parser.add_argument("--ways", type=lambda s: s.split(","), default=list(WAYS))
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1])
    parser.add_argument("--dtype", default="bfloat16", help="of the base")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=44, help="tokens of a row")
    parser.add_argument("--share", type=float, default=0.5, help="of rows with the trait")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--labelled", type=int, default=500, help="passages of each kind for the SAE and the judge")
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--sae-steps", type=int, default=300)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    main()
