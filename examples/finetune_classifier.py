"""Fine-tune a classifier with Trainer and a LoRA, kept off features that it should not use, and publish it.

    python examples/finetune_classifier.py --base HuggingFaceTB/SmolLM2-135M-Instruct --sae my-sae \
        --train train.csv --test test.csv --unintended 17,401,2210 --repo me/fair-toxicity

Rows have `text` and `label`, 0 or 1. What is pushed loads where this library is not installed, with
`AutoModelForSequenceClassification.from_pretrained(REPO, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import evaluate
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, EvalPrediction, Trainer, TrainingArguments

from sae_transformers import SaeForSequenceClassification, SparseAutoencoder, log_loss_terms, write_metric


def main() -> None:
    args, console = parse(), Console(highlight=False, soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    files = {"train": str(args.train), "test": str(args.test)}
    rows = load_dataset("csv", data_files=files).map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length), remove_columns="text"
    )

    model = SaeForSequenceClassification.from_base(
        args.base,
        saes=[SparseAutoencoder.from_pretrained(args.sae)],
        feature_head={"pooling": "mean", "removal": "own", "alignment": "decoder"},
        loss_weights={"unintended": args.penalty, "unintended_state": args.penalty},
    )
    model.set_unintended([int(latent) for latent in args.unintended.split(",")])
    model.config.pad_token_id = tokenizer.pad_token_id
    # The head is ours: PEFT has to be told to train it, and not the base's own.
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["feature_head"])
    tuned = get_peft_model(model, lora)

    calibration = evaluate.load(str(write_metric("calibration_error", args.out / "metrics")))

    def measures(found: EvalPrediction) -> dict[str, float]:
        probabilities = torch.tensor(found.predictions).softmax(-1)
        confidence, chosen = probabilities.max(-1)
        right = chosen == torch.tensor(found.label_ids)
        error = calibration.compute(predictions=confidence.tolist(), references=right.int().tolist()) or {}
        return {"accuracy": right.float().mean().item(), **error}

    trainer = Trainer(
        tuned,
        TrainingArguments(
            str(args.out / "training"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        compute_metrics=measures,
    )
    log_loss_terms(trainer)  # beside the total: lm_loss, unintended, unintended_state
    trainer.train()
    console.print(trainer.evaluate())

    merged = tuned.merge_and_unload()
    merged.config.weights_scope = "full"  # the LoRA is in the base now, which is therefore published too
    merged.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    if args.repo:
        merged.push_to_hub(args.repo)
        tokenizer.push_to_hub(args.repo)
        console.print(f"AutoModelForSequenceClassification.from_pretrained({args.repo!r}, trust_remote_code=True)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="base model")
    parser.add_argument("--sae", required=True, help="an SAE for it: a folder, a Hub id or a published short name")
    parser.add_argument("--train", type=Path, required=True, help=".csv with text and label")
    parser.add_argument("--test", type=Path, required=True, help="the same, to measure on")
    parser.add_argument("--unintended", required=True, help="latents that it must not use, comma-separated")
    parser.add_argument("--repo", help="Hub repository to push to")
    parser.add_argument("--out", type=Path, default=Path("outputs/classifier"))
    parser.add_argument("--penalty", type=float, default=0.3, help="weight of both penalties on unintended features")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
