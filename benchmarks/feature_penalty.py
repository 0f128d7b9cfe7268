"""An unwanted trait of a model: ways to take it out by fine-tuning, each with the same LoRA.

    python benchmarks/feature_penalty.py --texts ../shared/data/text --out outputs/feature-penalty

SmolLM2-135M-Instruct learns to write passages with a given word. Every other passage in its data is from a State of
the Union address, the trait; the others are from novels. `plain` is trained on them as they are, `filtered` on the
rows that a latent lets through which was conditioned on such addresses (SCAR), and others with a `FeaturePenalty` on
that latent, a group of latents or the DiffMean direction. With `own/` it is the model of `plain` that is trained
further, on passages that it writes itself: as they are, with a penalty, or without those that the latent finds.

What a model writes for new words is judged by a classifier of words that saw neither the training data nor the model.
Every (way, seed) is a file in `--out` and is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from feature_penalty_data import AS_THE_JUDGE_SAYS, Passages, Row, WordJudge, opening, row_of
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
from sae_transformers.latents.hidden_states import HiddenStateReader

TRAIT, FIRST = "politics", 14
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = ("plain", "own/plain", "own/latent@14+22+29:1:0.9", "own/diffmean@14+22+29:1:0.9", "own/filtered")
EVERY_TOKEN = 1000


# -- the model -------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How a model is trained: `plain`, `filtered`, or with penalties `KIND@LAYER+LAYER:NATS`, further `:QUANTILE` of
    novels' values that is the margin and `:FIRST` tokens of an answer that count. KIND: `latent`, the conditioned one;
    `group32`, the 32 whose activations differ most; `diffmean`. After `own/`: on what the model that was trained plain
    writes itself."""

    own: bool
    kind: str
    layers: tuple[int, ...]
    nats: float
    quantile: float
    first: int

    @classmethod
    def parse(cls, text: str) -> Way:
        kind, _, rest = text.removeprefix("own/").partition("@")
        layers, nats, quantile, first = [*rest.split(":"), "", "", ""][:4]
        numbers = tuple(int(number) for number in layers.split("+") if number)
        return cls(
            text.startswith("own/"), kind, numbers, float(nats or 0), float(quantile or 0.5), int(first or EVERY_TOKEN)
        )


def file_name(way: str) -> str:
    return re.sub(r"[@:/]", "-", way)


class Bench:
    """A model to train, of one seed and before it is trained: the base, or with `own` what plain training made of it.

    Besides, an SAE of each layer with a latent for the trait; all were trained on the base.
    """

    def __init__(self, args: argparse.Namespace, seed: int, *, own: bool) -> None:
        self.args, self.seed, self.own = args, seed, own
        self.passages = Passages(args.texts, args.validation)
        self.tokenizer = AutoTokenizer.from_pretrained(args.base)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        of_both = [(opening(p), 1 - kind) for kind, part in enumerate(self.passages.fit) for p in part]
        self.judge = WordJudge(*zip(*of_both, strict=True))
        self.read: dict[Any, Any] = {}
        self.start = Path(args.base)
        if own:
            folder = args.out / f"start-{seed}"
            if not (folder / "config.json").exists():
                trained, _ = train(Bench(args, seed, own=False), "plain")
                trained.merge_and_unload().lm.save_pretrained(folder)
            self.start = folder
        self.canary = canary_of(self)

    def load(self, name: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, self.args.dtype))

    def sae(self, layer: int) -> SparseAutoencoder:
        folder = self.args.out / f"sae-{layer}"
        if not (folder / "config.json").exists():
            texts, labels = self.passages.labelled(self.args.labelled, seed=0)
            result = train_concept(
                self.load(self.args.base), self.tokenizer, texts, labels, TRAIT,
                hook_point=f"layers.{layer}.resid_post", d_sae=self.args.d_sae, k=32, steps=self.args.sae_steps,
                max_length=64,
            )  # fmt: skip
            result.sae.save_pretrained(folder)
        return SparseAutoencoder.from_pretrained(folder)

    def states(self, layers: tuple[int, ...], first: int) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """After each layer, hidden states (n, d_model) at tokens that predict one of the `first` of an answer; and
        the answer's kind (n,)."""
        if (layers, first) not in self.read:
            chosen, places = random.Random(3), [f"layers.{layer}.resid_post" for layer in layers]
            parts = [chosen.sample(part, 100) for part in self.passages.fit]
            rows = [row_of(p, 1 - kind, chosen) for kind, part in enumerate(parts) for p in part]
            encoded = self.encoded(rows, first)
            ids = [torch.tensor(row["input_ids"]) for row in encoded]
            keep = [torch.tensor(row["penalty_mask"]).nonzero()[:, 0] for row in encoded]
            hidden = HiddenStateReader(self.load(self.start), places).read(ids, keep, dtype=torch.float32)
            kinds = torch.tensor([row.trait for row in rows]).repeat_interleave(torch.tensor([len(k) for k in keep]))
            self.read[layers, first] = dict(zip(layers, hidden.values(), strict=True)), kinds
        return self.read[layers, first]

    def penalised(self, way: Way, layer: int, number: int) -> tuple[SparseAutoencoder, FeaturePenalty]:
        """What is held down at a layer: above what it is in novels (SASFT); the gap between the kinds of text costs
        `way.nats` a token that counts, as much as in the LM's loss."""
        states, kinds = self.states(way.layers, way.first)
        sae, hidden = self.sae(layer), states[layer]
        if way.kind == "diffmean":
            sae = direction_sae(fit_diffmean(hidden, kinds)[None], sae.config)
        features = torch.tensor([0])
        if way.kind.startswith("group"):
            latents = sae.encode(hidden).detach()
            differences = (latents[kinds == 1].mean(0) - latents[kinds == 0].mean(0)) * sae.W_dec.norm(dim=-1)
            features = differences.topk(int(way.kind.removeprefix("group"))).indices
        values = sae.encode_pre_acts(hidden, features).detach()  # (n, m)
        margins = values[kinds == 0].quantile(way.quantile, dim=0)
        scale = 1 / values[kinds == 0].std(0)
        costs = torch.relu(values - margins) @ (scale / scale.sum())
        gap = float(costs[kinds == 1].mean() - costs[kinds == 0].mean())
        return sae, FeaturePenalty(
            dict(zip(features.tolist(), scale.tolist(), strict=True)), sae=number, weight=way.nats / gap,
            margin=margins.tolist(), over="mask", name=f"layer_{layer}",
        )  # fmt: skip

    def model(self, way: str = "plain") -> SaeForCausalLM:
        """Not trained, with its SAEs, the first at layer 14, and penalties."""
        parsed = Way.parse(way)
        held = [self.penalised(parsed, layer, number + 1) for number, layer in enumerate(parsed.layers)]
        return SaeForCausalLM.from_base(
            self.load(self.start), [self.sae(FIRST), *(sae for sae, _ in held)],
            feature_penalties=[penalty for _, penalty in held], force=True,
        )  # fmt: skip

    def encoded(self, rows: Sequence[Row], first: int = EVERY_TOKEN) -> list[dict[str, list[int]]]:
        found = []
        for row in rows:
            prompt = self.tokenizer(row.prompt)["input_ids"]
            answer = self.tokenizer(row.answer + self.tokenizer.eos_token)["input_ids"]
            answer = answer[: self.args.length - len(prompt)]
            mask = [0] * (len(prompt) - 1) + [int(place < first) for place in range(len(answer))] + [0]
            found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "penalty_mask": mask})
        return found

    def batch(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Padded right."""
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": -100, "penalty_mask": 0, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in fill.items()
        }

    def own_rows(self) -> list[Row]:
        """What the model writes before it is trained, one passage for each of other prompts than are measured with."""
        file = self.args.out / f"own-{self.seed}.json"
        if not file.exists():
            chosen, count = random.Random(self.seed), self.args.own_steps * self.args.batch_size // 2
            prompts = [row_of(p, 0, chosen).prompt for part in self.passages.train for p in chosen.sample(part, count)]
            texts = sampled(self, self.model().eval(), prompts, 1, temperature=1.0, top_k=0)
            file.write_text(json.dumps([[prompt, text] for prompt, (text,) in zip(prompts, texts, strict=True)]))
        return [Row(prompt, text, int(self.judge.says(text))) for prompt, text in json.loads(file.read_text())]

    def chosen_rows(self, way: str) -> tuple[list[Row], dict[str, int]]:
        args = self.args
        rows = self.own_rows() if self.own else self.passages.rows(args.steps * args.batch_size, args.share, self.seed)
        if Way.parse(way).kind != "filtered":
            return rows, {"rows": len(rows), "with_trait": sum(row.trait for row in rows)}
        model, scores = self.model(), []
        for start in range(0, len(rows), 32):
            inputs = self.tokenizer([r.answer for r in rows[start : start + 32]], return_tensors="pt", padding=True)
            scores += model.detect(inputs, feature=TRAIT, pre_activations=True).per_text.tolist()
        kept = [row for row, score in zip(rows, scores, strict=True) if score < 0]
        return kept, {"rows": len(kept), "with_trait": sum(row.trait for row in kept)}


def train(bench: Bench, way: str) -> tuple[Any, dict[str, Any]]:
    """A model trained in one way, and what its training was; it is kept as an adapter in `--out`."""
    args, model = bench.args, bench.model(way)
    folder = args.out / f"{file_name(way)}-{bench.seed}"
    if (folder / "facts.json").exists():
        return PeftModel.from_pretrained(model, str(folder)).eval(), json.loads((folder / "facts.json").read_text())
    rows, facts = bench.chosen_rows(way)
    set_seed(bench.seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEAR)
    steps, rate = (args.own_steps, args.own_learning_rate) if bench.own else (args.steps, args.learning_rate)
    tuned = get_peft_model(model, lora)
    settings = TrainingArguments(
        output_dir=str(args.out / "training"), max_steps=steps, per_device_train_batch_size=args.batch_size,
        learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=steps // 20, seed=bench.seed,
        save_strategy="no", logging_steps=steps, report_to="none", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    started = time.process_time()
    data: Any = bench.encoded(rows, Way.parse(way).first)
    result = Trainer(tuned, settings, train_dataset=data, data_collator=bench.batch).train()
    facts = {**facts, "loss": result.training_loss, "cpu_seconds": time.process_time() - started}
    tuned.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts))
    return tuned.eval(), facts


# -- what is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(bench: Bench, model: Any, trait: int, first: int = EVERY_TOKEN) -> list[float]:
    """Cross-entropy, nats per token, of the `first` tokens of each held-out answer of one kind."""
    chosen = random.Random(0)
    part = bench.passages.held_out[0 if trait else 1]
    rows = bench.encoded([row_of(p, trait, chosen) for p in chosen.sample(part, bench.args.held_out)])
    found = []
    for start in range(0, len(rows), 16):
        batch = bench.batch(rows[start : start + 16])
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        counted = (labels != -100) & ((labels != -100).cumsum(-1) <= first)
        each = (each.view_as(labels) * counted).sum(-1) / counted.sum(-1)
        found += each.tolist()
    return found


def new_prompts(bench: Bench) -> list[str]:
    """Prompts with words that no seed's data had."""
    args = bench.args
    used = {row.prompt for s in args.seeds for row in bench.passages.rows(args.steps * args.batch_size, args.share, s)}
    if bench.own:
        used |= {row.prompt for row in bench.own_rows()}
    chosen = random.Random(1)
    prompts = {row_of(p, 0, chosen).prompt for p in bench.passages.held_out[1]}
    return chosen.sample(sorted(prompts - used), args.prompts)


@torch.no_grad()
def sampled(
    bench: Bench, model: Any, prompts: Sequence[str], samples: int, *, temperature: float = 0.8, top_k: int = 50
) -> list[list[str]]:
    """Of each prompt so many passages."""
    tokenizer, found = bench.tokenizer, []
    torch.manual_seed(bench.seed)
    for start in range(0, len(prompts), 64 // samples):
        inputs = tokenizer(
            prompts[start : start + 64 // samples], return_tensors="pt", padding=True, padding_side="left"
        )
        made = model.generate(
            **inputs, do_sample=True, temperature=temperature, top_k=top_k, max_new_tokens=bench.args.new_tokens,
            num_return_sequences=samples, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return found


def canary_of(bench: Bench) -> FeatureCanary:
    """By held-out passages, of the model before it is trained."""
    count = bench.args.held_out
    parts = [random.Random(2).sample(part, count) for part in bench.passages.held_out]
    return FeatureCanary(
        bench.model(), bench.tokenizer, [opening(p) for part in parts for p in part], [1] * count + [0] * count,
        feature=TRAIT, settings=CanarySettings(max_length=48),
    )  # fmt: skip


def measured(bench: Bench, way: str) -> dict[str, Any]:
    model, facts = train(bench, way)
    reading = bench.canary.measure(model)
    texts = sampled(bench, model, new_prompts(bench), bench.args.samples)
    return {
        "way": way,
        "seed": bench.seed,
        **facts,
        "canary": reading.numbers(),
        "fallen": bench.canary.fallen(reading),
        "scores": [[bench.judge.score(text) for text in of_prompt] for of_prompt in texts],
        "clean_losses": losses(bench, model, 0),
        "trait_losses": losses(bench, model, 1),
        "opening_losses": losses(bench, model, 1, first=4),
        "texts": texts,
    }


class Summary(NamedTuple):
    """Of seeds of a way: the trait's rate with its 95 % interval over prompts, and what it costs."""

    rate: float
    low: float | None
    high: float | None
    clean: float
    trait: float

    def __str__(self) -> str:
        rate = f"rate {self.rate:.3f} ({self.low:.3f} to {self.high:.3f})"
        return f"{rate}, loss on novels {self.clean:.4f}, on addresses {self.trait:.4f}"


def summary(found: Sequence[dict[str, Any]]) -> Summary:
    of_seeds = torch.tensor([one["scores"] for one in found], dtype=torch.float64) > AS_THE_JUDGE_SAYS
    rates = of_seeds.double().mean(2).flatten()  # of each prompt of each seed
    counts = resample_counts(len(rates))
    low, high = percentiles((counts @ rates) / counts.sum(1))
    clean, trait = (statistics.mean(x for one in found for x in one[f"{kind}_losses"]) for kind in ("clean", "trait"))
    return Summary(float(rates.mean()), low, high, clean, trait)


def main() -> None:
    args, console = parse(), Console(highlight=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        benches: dict[bool, Bench] = {}
        for way in args.ways:
            file, own = args.out / f"{file_name(way)}-{seed}.json", Way.parse(way).own
            if not file.exists():
                benches[own] = benches.get(own) or Bench(args, seed, own=own)
                file.write_text(json.dumps(measured(benches[own], way)))
            found.setdefault(way, []).append(json.loads(file.read_text()))
            console.print(f"{way}, seed {seed}: {summary(found[way][-1:])}")
    for way, of_seeds in found.items():
        one, control = summary(of_seeds), found.get("own/plain" if Way.parse(way).own else "plain", of_seeds)
        plain = summary(control)
        cost = 100 * (one.clean / plain.clean - 1)
        beside = f"{one.rate / max(plain.rate, 1e-9):.2f} of plain's rate, {cost:+.2f} % loss on novels"
        console.print(f"{way}: {one}: {beside}")
        for each in of_seeds:
            numbers = {name.removeprefix("canary_"): round(value, 3) for name, value in each["canary"].items()}
            opening_loss = statistics.mean(each["opening_losses"])
            console.print(f"  {each['rows']} rows, {each['with_trait']} with the trait; {each['cpu_seconds']:.0f} s")
            console.print(f"  loss on the first four tokens of addresses {opening_loss:.4f}")
            console.print(f"  canary {numbers} {each['fallen'] or 'sings'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default=str(Path("~/.cache/sae_transformers").expanduser() / "SmolLM2-135M-Instruct-from-Q4_1")
    )
    parser.add_argument("--texts", type=Path, required=True, help="folder with the texts of the module's docstring")
    parser.add_argument("--out", type=Path, default=Path("outputs/feature-penalty"))
    parser.add_argument("--ways", type=lambda s: s.split(","), default=list(WAYS))
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1])
    parser.add_argument("--validation", action="store_true", help="measure on passages beside the held-out ones")
    parser.add_argument("--dtype", default="bfloat16", help="of the base")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--own-steps", type=int, default=20)
    parser.add_argument("--own-learning-rate", type=float, default=5e-4)
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
