"""SelfReg through a LoRA: a toxicity classifier, tuned by `Trainer` with and without its penalties, and how far its
score moves when only an identity is swapped.

    python benchmarks/selfreg_lora.py --base BASE --sae SAE --train toxicchat_train.jsonl \\
        --test toxicchat_test.jsonl --original wikipedia_talk_original.csv \\
        --swapped wikipedia_talk_identity_swapped.csv --out outputs/selfreg-lora

What trains is what a user writes: PEFT's LoRA, transformers' Trainer, and a model whose loss has the penalties. For
each seed: `plain`; `selfreg`, the features that react to the swap in a third of the pairs taken out of the states and
penalised in the head's weights and in the states; `group`, a `GroupPenalty` on what they contribute to the scores, and
nothing taken out; `random` and `random group`, as many other features. `own` and `own group` have the head of the
base, behind all layers, and a LoRA in all of them (`--ways`). Measured on the rest of the pairs and on balanced test
texts, none of which were trained on. A run that was stopped goes on after its last finished model.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from sae_transformers import (
    GroupPenalty,
    SaeForSequenceClassification,
    SparseAutoencoder,
    classification_metrics,
    counterfactual_features,
    swap_measures,
)
from sae_transformers.latents.hidden_states import read_hidden_states

WAYS = ("plain", "selfreg", "random", "group", "random group")
OWN = ("own", "own group", "own random group")  # the head of the base


def balanced(path: Path, count: int, seed: int) -> tuple[list[str], list[int]]:
    """Texts and labels of a .jsonl with `text` and `toxicity`, half of them toxic, in random order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = []
    for kind in ("0", "1"):
        of_kind = [row for row in rows if str(row["toxicity"]) == kind]
        chosen += random.Random(seed).sample(of_kind, count // 2)
    random.Random(seed + 1).shuffle(chosen)
    return [row["text"] for row in chosen], [int(row["toxicity"]) for row in chosen]


def read_pairs(original: Path, swapped: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Comments that the swap changes, and what they become."""
    both = []
    for path in (original, swapped):
        with path.open(encoding="utf-8", newline="") as file:
            both.append([row["comment"] for row in csv.DictReader(file)])
    pairs = [pair for pair in zip(*both, strict=True) if pair[0] != pair[1]]
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def new_model(args: argparse.Namespace, way: str, features: list[int], pad: int, max_norm: float | None) -> Any:
    reads, removes = way not in OWN, way in ("selfreg", "random")
    head = {"pooling": "mean", "removal": "own" if removes else "none", "alignment": "decoder", "max_norm": max_norm}
    model = SaeForSequenceClassification.from_base(
        args.base,
        saes=[SparseAutoencoder.from_pretrained(args.sae)],
        feature_head=head if reads else None,
        loss_weights={"unintended": args.penalty, "unintended_state": args.penalty} if removes else {},
        group_penalties=[GroupPenalty(features, weight=args.group_weight)] if way.endswith("group") else None,
        num_labels=2,
    )
    model.config.pad_token_id = model.lm.config.pad_token_id = pad
    if removes:
        model.set_unintended(features)
    return model


@torch.no_grad()
def margins_of(model: Any, tokenizer: Any, texts: list[str], max_length: int) -> torch.Tensor:
    """Logit of toxic less that of not, (n, 1), in the order of the texts."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found = torch.zeros(len(texts), 1)
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        batch = tokenizer([texts[i] for i in rows], truncation=True, max_length=max_length, padding=True)
        found[rows] = model(**batch.convert_to_tensors("pt")).logits.float() @ torch.tensor([[-1.0], [1.0]])
    return found


def run(
    args: argparse.Namespace, seed: int, way: str, features: list[int], held: list[tuple[str, str]], max_norm: float
) -> dict[str, float]:
    """One model, tuned and measured."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts, labels = balanced(args.train, args.texts, seed)
    model = new_model(args, way, features, tokenizer.pad_token_id, max_norm)
    head = "score" if way in OWN else "feature_head"
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=[head])
    tuned = get_peft_model(model, lora)
    rows = [tokenizer(text, truncation=True, max_length=args.max_length) for text in texts]
    data = Dataset.from_list([{**row, "labels": label} for row, label in zip(rows, labels, strict=True)])
    arguments = TrainingArguments(
        str(args.out / "training"), num_train_epochs=args.epochs, per_device_train_batch_size=16, learning_rate=5e-4,
        logging_steps=10, save_strategy="no", report_to=[], seed=seed, use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    start = time.process_time()
    Trainer(tuned, arguments, train_dataset=data, processing_class=tokenizer).train()
    seconds = time.process_time() - start
    test, wanted = balanced(args.test, args.texts, 0)
    margins = margins_of(tuned, tokenizer, test, args.max_length)
    sides = [margins_of(tuned, tokenizer, list(side), args.max_length) for side in zip(*held, strict=True)]
    measures = classification_metrics(margins, torch.tensor(wanted), "binary")
    return {**measures, **swap_measures(*sides), "train_seconds": seconds}


def main() -> None:
    args, console = parse(), Console(highlight=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for seed in args.seeds:
        pairs = read_pairs(args.original, args.swapped, args.pairs, seed)
        third = len(pairs) // 3
        reader = new_model(args, "plain", [], tokenizer.pad_token_id, None)
        sides = [
            read_hidden_states(reader, tokenizer, list(side), max_tokens=args.max_length)
            for side in zip(*pairs[:third], strict=True)
        ]
        chosen = counterfactual_features(
            reader.saes[0], sides[0].hidden.float(), sides[1].hidden.float(),
            texts=(sides[0].text_index, sides[1].text_index), top=args.features,
        )  # fmt: skip
        reacting = chosen["indices"].tolist()
        max_norm = 10 * float(sides[0].hidden.float().norm(dim=-1).median())  # first tokens are far beyond
        others = sorted(set(range(reader.saes[0].config.d_sae)) - set(reacting))
        for way in args.ways:
            name = f"{way} {seed}"
            if name in results:
                continue
            features = random.Random(seed).sample(others, args.features) if "random" in way else reacting
            results[name] = run(args, seed, way, features, pairs[third:], max_norm)
            draft = file.with_suffix(".draft")
            draft.write_text(json.dumps(results, indent=2))
            draft.replace(file)
            console.print(name, {key: round(value, 4) for key, value in results[name].items()})
    show(results, args.seeds, console)


def show(results: dict[str, Any], seeds: list[int], console: Console) -> None:
    table = Table("", "F1", "change of the score, in standard deviations", "flips", title=f"{len(seeds)} seeds")
    for way in (*WAYS, *OWN):
        found = [results[f"{way} {seed}"] for seed in seeds if f"{way} {seed}" in results]
        if not found:
            continue
        cells = []
        for name in ("f1", "delta_in_std", "flips"):
            values = [one[name] for one in found]
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        table.add_row(way, *cells)
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    for name in ("sae", "train", "test", "original", "swapped"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/selfreg-lora"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=700, help="that train, and that test")
    parser.add_argument("--pairs", type=int, default=450)
    parser.add_argument("--features", type=int, default=100, help="that react most to the swap")
    parser.add_argument("--penalty", type=float, default=0.3, help="weight of both penalties")
    parser.add_argument("--group-weight", type=float, default=1.0, help="of `group`")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *OWN], default=list(WAYS))
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--max-length", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
