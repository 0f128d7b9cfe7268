"""A base fine-tuned on a topic's texts with low-rank changes: what steering towards the topic is compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tune_on_texts(
    base: Any,
    sequences: Sequence[Tensor],
    *,
    rank: int = 8,
    epochs: float = 3.0,
    learning_rate: float = 2e-4,
    batch_size: int = 8,
    seed: int = 0,
) -> Any:
    """LoRA (https://huggingface.co/papers/2106.09685) by `Trainer`, on all linear layers.

    Args:
        base: a causal language model. Its own weights stay; `unload()` of the result gives it back as it was.
        sequences: (length,) int64 token ids each, at least two.
        rank: of the changes; they are scaled by 2.
        epochs, learning_rate, batch_size, seed: of the training.

    Returns:
        A PEFT model around the base, in eval mode.

    Raises:
        ValueError: no sequence of two tokens, or a setting out of range.
    """
    rows = [ids for ids in sequences if len(ids) > 1]
    if not rows or not epochs > 0 or rank < 1:
        raise ValueError(
            f"Fine-tuning needs texts of two tokens, and epochs and a rank above 0. "
            f"Received: {len(rows)} texts, epochs={epochs!r}, rank={rank!r}."
        )
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(base, lora)

    def collate(batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = [row["ids"] for row in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        real = torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in ids])[:, None]
        return {
            "input_ids": padded,
            "attention_mask": real.long(),
            "labels": padded.masked_fill(~real, -100),
        }

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=next(base.parameters()).device.type == "cpu",
        )
        dataset: Any = [{"ids": ids} for ids in rows]
        trainer = Trainer(model=tuned, args=arguments, train_dataset=dataset, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return tuned.eval()
