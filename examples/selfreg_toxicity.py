"""SelfReg (https://huggingface.co/papers/2502.14133) on ToxicChat: a classifier kept off identity terms.

    python examples/selfreg_toxicity.py --train toxicchat_train.jsonl --test toxicchat_test.jsonl \\
        --original wikipedia_talk_original.csv --swapped wikipedia_talk_identity_swapped.csv --sae outputs/pretrain/sae

An SAE (of examples/pretrain_sae.py) is fine-tuned on the task's texts. Features that react when identity terms are
swapped in one half of the Wikipedia comments are called unintended. Eight methods train heads on cached states, six
seeds each; ToxicChat's test part gives accuracy, F1 and AUROC, the other half of the comments how far a score moves
when only identity terms change. A sweep over the penalty and over removal follows. Prints numbers, never texts; writes
results.json. About 20 minutes on two cores, most of it to read the hidden states, which are cached in --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from sae_transformers import SparseAutoencoder
from sae_transformers.create_training_data.base_model import find_base_model
from sae_transformers.create_training_data.concepts import read_rows, toxic_chat
from sae_transformers.create_training_data.hidden_states import HiddenStateReader
from sae_transformers.evaluation.classification import classification_metrics, paired_t_test, summary
from sae_transformers.evaluation.reliance import feature_reliance, swap_sensitivity
from sae_transformers.training.arguments import SaeTrainingArguments
from sae_transformers.training.head_settings import METHODS, HeadSettings
from sae_transformers.training.heads import TrainedHead, train_heads
from sae_transformers.training.shards import TensorTokens
from sae_transformers.training.trainer import SaeTrainer
from sae_transformers.training.unintended import counterfactual_features

SEEDS = (14592, 3278, 36048, 32098, 29256, 18289)  # the paper's
TEMPLATE = "Message of a user:\n{text}\n\nIs the message above toxic, hateful or obscene? Answer yes or no:"


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
    """Of each text: its tokens' states (n_tokens, d) with their text (n_tokens,), and the last token's (n_texts, d)
    when it stands in the template."""
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    ids = [torch.tensor(row or [tokenizer.eos_token_id]) for row in rows]
    keep = [torch.arange(min(1, len(row) - 1), len(row)) for row in ids]  # the first token is an outlier
    tokens = reader.read(ids, keep, dtype=torch.float32)[place]
    index = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(k) for k in keep]))
    say(f"  {len(tokens):,} tokens")
    cut = tokenizer.batch_decode(rows, skip_special_tokens=True)
    asked = tokenizer([TEMPLATE.format(text=text) for text in cut])["input_ids"]
    asked = [torch.tensor(row) for row in asked]
    last = reader.read(asked, [torch.tensor([len(row) - 1]) for row in asked], dtype=torch.float32)[place]
    mean = torch.zeros(len(ids), tokens.shape[1]).index_add_(0, index, tokens)
    mean /= torch.bincount(index, minlength=len(ids))[:, None]
    return {"tokens": tokens.half(), "index": index, "last": last, "mean": mean}


def cached_states(args: argparse.Namespace, sae: SparseAutoencoder, console: Console) -> dict[str, dict[str, Tensor]]:
    """States of all texts by part, with labels; read once."""
    train, test = (list(toxic_chat(read_rows(str(path)))) for path in (args.train, args.test))
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
                source = find_base_model(args.model).name
                tokenizer = AutoTokenizer.from_pretrained(source)
                model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
                reader = HiddenStateReader(model.eval(), [sae.config.read_at])
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


def fine_tune(sae: SparseAutoencoder, tokens: Tensor, epochs: int) -> dict[str, float]:
    """SelfReg's fine-tuning: latents that the task never activates learn what the others leave."""
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


def measure(
    heads: Sequence[TrainedHead], data: dict[str, Tensor], labels: Tensor, sae: Any, unintended: Tensor
) -> Any:
    """One row of numbers a head: on the test part, and on pairs of comments kept for this."""
    rows = []
    for head in heads:
        swap = swap_sensitivity(head.logits(data["original"]), head.logits(data["swapped"]), resamples=1)
        found = classification_metrics(head.logits(data["test"]), labels, "binary")
        spread = head.logits(data["test"]).std()
        rows.append(
            {
                **{name: found[name] for name in ("accuracy", "f1", "auroc", "ece")},
                "swap_logit": swap["delta_logit"]["value"],
                "swap_relative": swap["delta_logit"]["value"] / float(spread),
                "swap_probability": swap["delta_probability"]["value"],
                "flips": swap["flips"]["value"],
                "reliance": feature_reliance(head.weight, data["test"], sae, unintended)["contribution"],
            }
        )
    return rows


def compare(
    settings: dict[str, HeadSettings], args: argparse.Namespace, data: dict[str, Tensor], labels: Any, sae: Any, U: Any
) -> dict[str, list[dict[str, float]]]:
    """Name -> rows of `measure`, one a seed; every head is trained in one pass."""
    runs = [(one, seed) for one in settings.values() for seed in args.seeds]
    heads = train_heads(data["train"], labels["train"], runs, objective="binary", sae=sae, unintended=U)
    n = len(args.seeds)
    return {name: measure(heads[i * n : (i + 1) * n], data, labels["test"], sae, U) for i, name in enumerate(settings)}


def show(rows: dict[str, list[dict[str, float]]], title: str, console: Console, against: str = "plain") -> None:
    names = ("accuracy", "f1", "auroc", "ece", "swap_logit", "swap_relative", "swap_probability", "flips", "reliance")
    table = Table("method", *names, title=title)
    for method, found in rows.items():
        cells = [f"{one.mean:.4f} ± {one.high - one.mean:.4f}" for one in (summary(found)[name] for name in names)]
        table.add_row(method, *cells)
    console.print(table)
    if against in rows:
        base = rows[against]
        for method, found in rows.items():
            if method != against:
                f1 = paired_t_test([r["f1"] for r in found], [r["f1"] for r in base], "two-sided")
                cut = sum(r["swap_relative"] for r in found) / sum(r["swap_relative"] for r in base) - 1
                console.print(f"  {method}: F1 {f1.difference:+.4f} (p {f1.p:.3f}), swap sensitivity {cut:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "test", "original", "swapped"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sae", required=True, help="folder of an SAE, e.g. of examples/pretrain_sae.py")
    parser.add_argument("--model", help="folder or Hub id; SmolLM2-135M-Instruct by default")
    parser.add_argument("--out", type=Path, default=Path("outputs/selfreg"))
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--pooling", default="mean", choices=("mean", "last"))
    parser.add_argument("--epochs", type=int, default=5, help="of the SAE's fine-tuning")
    parser.add_argument("--share", type=float, default=0.05, help="of the latents that are called unintended")
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.3, 1, 3, 10, 31, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console, start = Console(width=170), time.perf_counter()
    sae = SparseAutoencoder.from_pretrained(args.sae)
    states = cached_states(args, sae, console)
    facts = fine_tune(sae, states["train"]["tokens"], args.epochs)
    half = torch.randperm(len(states["original"]["mean"]), generator=torch.Generator().manual_seed(0))
    judge, report = half[: len(half) // 2], half[len(half) // 2 :]
    pooled = {name: part[args.pooling] for name, part in states.items()}
    labels = {name: states[name]["labels"] for name in ("train", "test")}
    found = counterfactual_features(
        sae, pooled["original"][judge], pooled["swapped"][judge], top=round(args.share * sae.config.d_sae)
    )
    unintended = found["indices"]
    facts |= {"unintended": len(unintended), "pairs_judged": len(judge), "pairs_measured": len(report)}
    console.print(facts)
    data = {"train": pooled["train"], "test": pooled["test"]}
    data |= {name: pooled[name][report] for name in ("original", "swapped")}
    methods = {name: HeadSettings(method=name, penalty=args.penalties[len(args.penalties) // 2]) for name in METHODS}
    results = {"methods": compare(methods, args, data, labels, sae, unintended)}
    show(results["methods"], f"ToxicChat, {args.pooling}, {len(args.seeds)} seeds", console)
    sweep: dict[str, HeadSettings] = {"plain": HeadSettings()}
    for removal in ("relu", "none"):
        for penalty in (0.0, *args.penalties):
            name = f"penalty {penalty:g}, {'removal' if removal == 'relu' else 'kept'}"
            sweep[name] = HeadSettings(method="selfreg", penalty=penalty, removal=removal)
    results["sweep"] = compare(sweep, args, data, labels, sae, unintended)
    show(results["sweep"], "SelfReg: penalty and removal", console)
    generator = torch.Generator().manual_seed(0)
    random_features = torch.randperm(sae.config.d_sae, generator=generator)[: len(unintended)]
    chance = {"plain": HeadSettings(), "random features": methods["selfreg"]}
    results["random"] = compare(chance, args, data, labels, sae, random_features)
    show(results["random"], "As many features at random", console)
    facts["seconds"] = time.perf_counter() - start
    (args.out / "results.json").write_text(json.dumps({"facts": facts, **results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
