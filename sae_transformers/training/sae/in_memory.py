"""Fit a sparse autoencoder, one of whose latents detects a concept, to hidden states in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from ...modeling import SparseAutoencoder
from .arguments import SaeTrainingArguments
from .callbacks import ProgressCallback
from .dataset import TensorTokens
from .initialization import usual_norm
from .trainer import SaeTrainer


def fit_conditioned_sae(
    sae: SparseAutoencoder,
    hidden: Tensor,
    labels: Tensor,
    *,
    steps: int,
    tokens_per_step: int = 1024,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[int, int], object] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Train `sae` in place on hidden states; its concept latents learn to detect.

    The bias starts at the data's mean and each concept's latent at its DiffMean direction. AdamW without weight decay,
    learning rate warmed up over 5 % of the steps, then along a cosine to 0.

    Args:
        sae: with its place and at least one concept in `config.concepts`; on the device to train on.
        hidden: (n_tokens, d_in), any float dtype; rows of unusual norm are left out.
        labels: (n_tokens, n_concepts) in the order of `config.concepts`: 1 present, 0 absent, -100 unknown.
        steps: optimizer steps.
        tokens_per_step: rows drawn, without replacement within an epoch, for a step.
        report: called with (step, steps) after every step.
        settings: more `SaeTrainingArguments`.

    Returns:
        `loss`: mean training loss; `tokens`: rows used; `left_out`: rows of unusual norm.

    Raises:
        ValueError: shapes do not fit the SAE, a value is not finite, or a count is below 1.
    """
    concepts = list(sae.config.concepts)
    if hidden.ndim != 2 or hidden.shape[1] != sae.config.d_in:
        raise ValueError(f"`hidden` must be (n_tokens, {sae.config.d_in}). Received: {tuple(hidden.shape)}.")
    if labels.shape != (len(hidden), len(concepts)) or not concepts:
        raise ValueError(
            f"`labels` must be (n_tokens, n_concepts) = ({len(hidden)}, {len(concepts)}), with a concept or more. "
            f"Received: {tuple(labels.shape)}."
        )
    for name, value in (("steps", steps), ("tokens_per_step", tokens_per_step)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value!r}.")
    if not bool(torch.isfinite(hidden).all()):
        raise ValueError("`hidden` must be finite. Received: NaN or infinite values.")
    usual = usual_norm(hidden)
    data = TensorTokens({sae.config.read_at: hidden[usual], "labels": labels[usual].float()}, concepts)
    with tempfile.TemporaryDirectory() as folder:
        defaults: dict[str, Any] = {
            "weight_init": "keep",
            "concept_init": "diffmean",
            "init_tokens": len(data),
            "decoder_norm": "none",
            "lr_scheduler_type": "cosine",
            "warmup_steps": -(-steps // 20),
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": sae.device.type == "cpu",
        }
        arguments = SaeTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=tokens_per_step,
            learning_rate=learning_rate,
            seed=seed,
            **{**defaults, **settings},
        )
        trainer = SaeTrainer(sae, arguments, data, callbacks=[ProgressCallback(report)] if report else None)
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    return {"loss": result.training_loss, "tokens": len(data), "left_out": int((~usual).sum())}
