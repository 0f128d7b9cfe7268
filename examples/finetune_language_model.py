"""Fine-tune a language model with a LoRA while one of its features is scaled, and publish both.

    python examples/finetune_language_model.py --base HuggingFaceTB/SmolLM2-135M-Instruct --sae my-sae \
        --text train.txt --feature 17 --scale 0 --repo me/model-without-17

With the feature switched off in training (`--scale 0`) the LoRA learns to write without it; with one made stronger it
need not learn what the feature brings. The SAE's losses hold the states where the SAE can read them. `--trl` uses
TRL's `SFTTrainer`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, Steering, log_loss_terms


def main() -> None:
    args, console = parse(), Console(highlight=False, soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("text", data_files=str(args.text), split="train").filter(lambda row: row["text"].strip())

    model = SaeForCausalLM.from_base(
        args.base,
        saes=[SparseAutoencoder.from_pretrained(args.sae)],
        loss_weights={"lm": 1.0, "reconstruction": args.reconstruction},
        detach_hidden=False,  # the SAE's loss regularises the base, where the LoRA is
    )
    model.saes.requires_grad_(False)
    # In force in every forward pass, in training too, and saved with the model.
    model.steering = Steering([FeatureEdit(0, args.feature, "scale", args.scale)])
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])

    trainer = (trl_trainer if args.trl else plain_trainer)(args, model, tokenizer, rows, lora)
    log_loss_terms(trainer)  # lm_loss and reconstruction beside the total
    trainer.train()

    tuned: Any = trainer.model
    merged = tuned.merge_and_unload()
    merged.config.weights_scope = "full"
    merged.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    if args.repo:
        merged.push_to_hub(args.repo)
        tokenizer.push_to_hub(args.repo)
        console.print(f"AutoModelForCausalLM.from_pretrained({args.repo!r}, trust_remote_code=True)")


def plain_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, lora: LoraConfig) -> Trainer:
    tokens = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length), remove_columns="text"
    )
    return Trainer(
        get_peft_model(model, lora),
        TrainingArguments(**settings(args)),
        train_dataset=tokens,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def trl_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, lora: LoraConfig) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    class PlainLossTrainer(SFTTrainer):
        # TRL's own (1.16) takes the base's last hidden state, past the model's forward pass and the SAEs' losses.
        compute_loss = Trainer.compute_loss

    return PlainLossTrainer(
        model,
        SFTConfig(**settings(args), max_length=args.max_length, bf16=torch.cuda.is_available()),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(args.out / "training"),
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="base model")
    parser.add_argument("--sae", required=True, help="an SAE for it: a folder, a Hub id or a published short name")
    parser.add_argument("--text", type=Path, required=True, help="text to train on, a row per line")
    parser.add_argument("--feature", type=int, required=True, help="latent that is scaled")
    parser.add_argument("--scale", type=float, default=0.0, help="what it is multiplied by")
    parser.add_argument("--reconstruction", type=float, default=0.1, help="weight of the SAE's reconstruction error")
    parser.add_argument("--trl", action="store_true", help="train with TRL's SFTTrainer")
    parser.add_argument("--repo", help="Hub repository to push to")
    parser.add_argument("--out", type=Path, default=Path("outputs/language-model"))
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()
