"""SelfReg (https://huggingface.co/papers/2502.14133) on ToxicChat: a classifier kept off identity terms.

    python examples/selfreg_toxicity.py --train toxicchat_train.jsonl --test toxicchat_test.jsonl \\
        --original wikipedia_talk_original.csv --swapped wikipedia_talk_identity_swapped.csv --sae outputs/pretrain/sae

An SAE (of examples/pretrain_sae.py) is fine-tuned on the texts. Features that react when identity terms are swapped in
one half of the Wikipedia comments are called unintended. Eight methods train heads on the mean hidden state of a text,
six seeds each; ToxicChat's test part gives accuracy, F1 and AUROC, the other half of the comments how far a score
moves when only identity terms change. SelfReg's penalty, what it keeps small, and the number of features are chosen
on the validation texts and the first half; the whole sweep is shown. Prints numbers, never texts; writes results.json.
About 20 minutes on two cores, most of it to read the hidden states, which are cached in --out.

Needs: pip install 'sae-transformers[evaluation]'
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import Tensor
from transformers import PrinterCallback

from sae_transformers import (
    HeadSettings,
    HiddenStateReader,
    SaeTrainer,
    SaeTrainingArguments,
    SparseAutoencoder,
    TensorTokens,
    classification_metrics,
    counterfactual_features,
    load,
    open_text,
    read_unintended,
    train_heads,
)

SEEDS = (14592, 3278, 36048, 32098, 29256, 18289)  # the paper's
BASELINES = ("plain", "dropout", "l2", "overfit", "focal", "label_smoothing", "spectral_norm")
ALIGNMENTS = ("affine", "encoder", "decoder")  # of SelfReg's penalty, see `HeadSettings`
BASE = HeadSettings(learning_rate=3e-3)  # at SelfReg's 1e-3 the plain head, too, stops before it has learnt the task


def read_pairs(original: Path, swapped: Path) -> list[tuple[str, str]]:
    """Comments and their counterparts, where the swap changed anything."""
    columns = []
    for path in (original, swapped):
        with path.open(encoding="utf-8", newline="") as file:
            columns.append([row["comment"] for row in csv.DictReader(file)])
    return [(one, other) for one, other in zip(*columns, strict=True) if one != other]


# -- hidden states ----------------------------------------------------------------------------------------------------


def read_states(
    reader: HiddenStateReader, tokenizer: Any, texts: Sequence[str], place: str, *, max_length: int, say: Any
) -> dict[str, Tensor]:
    """States of the tokens (n_tokens, d) with their text (n_tokens,). A text's first token, and others whose states
    are ten times as long as the median, are outliers that would be all that is left of a mean."""
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    ids = [torch.tensor(row or [tokenizer.eos_token_id]) for row in rows]
    keep = [torch.arange(min(1, len(row) - 1), len(row)) for row in ids]
    tokens = reader.read(ids, keep, dtype=torch.float32)[place]
    index = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(k) for k in keep]))
    norms = tokens.norm(dim=-1)
    short = norms <= 10 * norms.median()
    alone = torch.bincount(index[short], minlength=len(ids)) == 0
    counted = short | alone[index]
    say(f"  {len(tokens):,} tokens, {int((~counted).sum())} outliers")
    return {"tokens": tokens[counted].half(), "index": index[counted]}


def cached_states(args: argparse.Namespace, sae: SparseAutoencoder, console: Console) -> dict[str, dict[str, Tensor]]:
    """States of all texts by part, with labels; read once."""
    train, test = (
        [(row.get("user_input", row.get("text")), int(row["toxicity"])) for row in open_text(str(path)).rows()]
        for path in (args.train, args.test)
    )
    pairs = read_pairs(args.original, args.swapped)
    parts = {
        "train": [text for text, _ in train],
        "test": [text for text, _ in test],
        "original": [one for one, _ in pairs],
        "swapped": [other for _, other in pairs],
    }
    found, reader, tokenizer = {}, None, None
    for name, texts in parts.items():
        file = args.out / f"states-{name}.safetensors"
        if not file.exists():
            if reader is None:
                model, tokenizer, _ = load(args.model, [], model_dtype="float32")
                reader = HiddenStateReader(model.lm, [sae.config.read_at])
            console.print(f"hidden states of {len(texts):,} texts: {name}")
            states = read_states(
                reader, tokenizer, texts, sae.config.read_at, max_length=args.max_length, say=console.print
            )
            part = file.with_suffix(".part")
            save_file(states, part)
            part.replace(file)
        found[name] = load_file(file)
    for name, rows in (("train", train), ("test", test)):
        found[name]["labels"] = torch.tensor([label for _, label in rows])
    return found


# -- the SAE ----------------------------------------------------------------------------------------------------------


def fine_tune(sae: SparseAutoencoder, states: dict[str, dict[str, Tensor]], epochs: int) -> dict[str, Any]:
    """SelfReg's fine-tuning: latents that the task never activates learn what the others leave."""
    tokens = torch.cat([states[name]["tokens"] for name in ("train", "original", "swapped")])
    data = TensorTokens({sae.config.read_at: tokens.float()})
    with tempfile.TemporaryDirectory() as folder:
        settings = SaeTrainingArguments(
            output_dir=folder,
            finetune_dead=True,
            decoder_norm="none",
            weight_init="keep",
            bias_init="keep",
            num_train_epochs=epochs,
            per_device_train_batch_size=2048,
            learning_rate=5e-5,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = SaeTrainer([sae], settings, data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        dead = trainer.model.saes[0].dead
    return {"dead_on_the_task": float(dead.float().mean())}


# -- heads ------------------------------------------------------------------------------------------------------------


class Texts:
    """Mean states of all texts, with and without some features."""

    def __init__(self, states: dict[str, dict[str, Tensor]], halves: tuple[Tensor, Tensor], sae: Any) -> None:
        self.states, self.halves, self.sae = states, halves, sae

    def means(self, features: Tensor | None = None) -> dict[str, Tensor]:
        """(n_texts, d) of each part. Features are taken out of each token where they are active."""
        found: dict[str, Tensor] = {}
        for name, part in self.states.items():
            index, n = part["index"], int(part["index"][-1]) + 1
            total = torch.zeros(n, part["tokens"].shape[1])
            for rows in torch.arange(len(index)).split(8192):
                hidden = part["tokens"][rows].float()
                if features is not None:
                    with torch.no_grad():
                        hidden = self.sae.remove(hidden, features, "own")
                total.index_add_(0, index[rows], hidden)
            found[name] = total / torch.bincount(index)[:, None]
        return found

    def react(self, count: int) -> Tensor:
        """The `count` latents that react most when identity terms are swapped in the first half of the comments."""
        inside = torch.zeros(len(self.halves[0]) + len(self.halves[1]), dtype=torch.bool)
        inside[self.halves[0]] = True
        number = inside.cumsum(0) - 1
        sides = [self.states[name] for name in ("original", "swapped")]
        chosen = [inside[side["index"]] for side in sides]
        tokens = [side["tokens"][rows].float() for side, rows in zip(sides, chosen, strict=True)]
        texts = [number[side["index"][rows]] for side, rows in zip(sides, chosen, strict=True)]
        return counterfactual_features(self.sae, tokens[0], tokens[1], texts=(texts[0], texts[1]), top=count)[
            "indices"
        ]


class Sweep:
    """Trains heads and measures them: name -> a row a seed."""

    def __init__(self, texts: Texts, labels: dict[str, Tensor], seeds: Sequence[int]) -> None:
        self.texts, self.labels, self.seeds = texts, labels, seeds

    def __call__(
        self, settings: dict[str, HeadSettings], features: Tensor | None = None, *, removed: bool = False
    ) -> dict[str, list[dict[str, float]]]:
        """`features` are penalised for SelfReg and, with `removed`, are no longer in the states."""
        data = self.texts.means(features if removed else None)
        runs = [(replace(one, removal="none"), seed) for one in settings.values() for seed in self.seeds]
        given = {} if features is None else {"sae": self.texts.sae, "unintended": features}
        heads = train_heads(data["train"], self.labels["train"], runs, objective="binary", **given)
        n = len(self.seeds)
        return {
            name: [self.measure(head, data) for head in heads[i * n : (i + 1) * n]] for i, name in enumerate(settings)
        }

    def measure(self, head: Any, data: dict[str, Tensor]) -> dict[str, float]:
        logits = {name: head.logits(states) for name, states in data.items()}
        found = classification_metrics(logits["test"], self.labels["test"], "binary")
        judged, held = self.texts.halves
        moved = (logits["original"] - logits["swapped"]).double().abs()
        flipped = (logits["original"] > 0) != (logits["swapped"] > 0)
        change = float(moved[held].mean())
        return {
            **{name: found[name] for name in ("accuracy", "f1", "auroc", "ece")},
            "delta_logit": change,
            "delta_in_std": change / float(logits["original"][held].std()),
            "flips": float(flipped[held].double().mean()),
            "validation_f1": head.validation_score,
            "judged_delta": float(moved[judged].mean()),
        }


def mean_of(rows: Sequence[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def chosen_of(rows: dict[str, list[dict[str, float]]], plain: Sequence[dict[str, float]], loss: float = 0.01) -> str:
    """The setting that moves least on the judged comments among those that lose at most `loss` of F1 on the
    validation texts. The test part and the other comments have no say."""
    least = mean_of(plain, "validation_f1") - loss
    allowed = {name: found for name, found in rows.items() if mean_of(found, "validation_f1") >= least} or rows
    return min(allowed, key=lambda name: mean_of(allowed[name], "judged_delta"))


def with_interval(values: Sequence[float]) -> str:
    """The mean over seeds and half of Student's 95 % interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def show(rows: dict[str, list[dict[str, float]]], plain: Sequence[dict[str, float]], title: str, say: Console) -> None:
    names = ("accuracy", "f1", "auroc", "ece", "delta_logit", "delta_in_std", "flips")
    columns = ("accuracy", "F1", "AUROC", "ECE", "|Δ logit|", "in std", "flips", "to plain", "F1 to plain (p)")
    table = Table("", *columns, title=title)
    for method, found in rows.items():
        cells = [with_interval([row[name] for row in found]) for name in names]
        cut = mean_of(found, "delta_logit") / mean_of(plain, "delta_logit") - 1
        points = [100 * (own["f1"] - other["f1"]) for own, other in zip(found, plain, strict=True)]
        test: Any = stats.ttest_1samp(points, 0)
        p = float(test.pvalue) if any(points) else float("nan")
        table.add_row(method, *cells, f"{cut:+.1%}", f"{statistics.mean(points):+.2f} ({p:.2f})")
    say.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("train", "test", "original", "swapped"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sae", required=True, help="folder of an SAE, e.g. of examples/pretrain_sae.py")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--judged", type=Path, help="a table of `sae-transformers judge`, for a row of its own")
    parser.add_argument("--out", type=Path, default=Path("outputs/selfreg"))
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=5, help="of the SAE's fine-tuning")
    parser.add_argument("--counts", type=int, nargs="+", default=[30, 60, 100, 200], help="of unintended features")
    parser.add_argument("--penalties", type=float, nargs="+", default=[0, 0.1, 0.3, 1, 3, 10, 31])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console, start = Console(width=180), time.perf_counter()
    sae = SparseAutoencoder.from_pretrained(args.sae)
    states = cached_states(args, sae, console)
    labels = {name: states[name].pop("labels") for name in ("train", "test")}
    facts: dict[str, Any] = {}
    if (args.out / "sae").exists():
        sae = SparseAutoencoder.from_pretrained(args.out / "sae")
    else:
        facts |= fine_tune(sae, states, args.epochs)
        sae.save_pretrained(args.out / "sae")
    order = torch.randperm(int(states["original"]["index"][-1]) + 1, generator=torch.Generator().manual_seed(0))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    facts |= {"pairs_judged": len(halves[0]), "pairs_measured": len(halves[1])}
    console.print(facts)
    texts = Texts(states, halves, sae)
    sweep = Sweep(texts, labels, args.seeds)
    results: dict[str, Any] = {"methods": sweep({name: replace(BASE, method=name) for name in BASELINES})}
    plain = results["methods"]["plain"]
    results["sweep"], ranked = {}, texts.react(max(args.counts))
    for count in args.counts:
        for removed in (True, False):
            where = f"{count} features, {'removed' if removed else 'kept'}"
            settings = {
                f"{where}, {alignment} penalty {penalty:g}": replace(
                    BASE, method="selfreg", penalty=penalty, alignment=alignment
                )
                for alignment in ALIGNMENTS
                for penalty in args.penalties
                if penalty or (removed and alignment == ALIGNMENTS[0])
            }
            results["sweep"] |= sweep(settings, ranked[:count], removed=removed)
    facts["chosen"] = chosen_of(results["sweep"], plain)
    results["methods"]["selfreg"] = results["sweep"][facts["chosen"]]
    show(results["methods"], plain, f"ToxicChat, {len(args.seeds)} seeds; selfreg: {facts['chosen']}", console)
    show(
        results["sweep"], plain, "SelfReg: how many features, removed or kept, what is penalised and how much", console
    )
    others = {"as many at random": torch.randperm(sae.config.d_sae, generator=torch.Generator().manual_seed(0))}
    others["as many at random"] = others["as many at random"][: int(facts["chosen"].split()[0])]
    if args.judged is not None:
        others["named by the judge"] = torch.tensor(read_unintended(args.judged, sae), dtype=torch.long)
    results["other_features"] = {}
    for name, features in others.items():
        for penalty in (0.0, 1.0):
            one = {
                f"{len(features)} {name}, removed, decoder penalty {penalty:g}": replace(
                    BASE, method="selfreg", penalty=penalty, alignment="decoder"
                )
            }
            results["other_features"] |= sweep(one, features, removed=True)
    show(results["other_features"], plain, "Other features", console)
    facts["seconds"] = time.perf_counter() - start
    (args.out / "results.json").write_text(json.dumps({"facts": facts, **results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
