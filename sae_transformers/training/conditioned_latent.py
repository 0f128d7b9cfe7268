"""Fit a sparse autoencoder, one of whose latents detects a concept, to hidden states: with transformers' `Trainer`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..modeling import SparseAutoencoder
from .diffmean import fit_diffmean


class HiddenStateBatches(Dataset):
    """Hidden states (n_tokens, d_in) and labels (n_tokens, n_concepts), indexed a whole batch at a time."""

    def __init__(self, hidden: Tensor, labels: Tensor) -> None:
        self.hidden, self.labels = hidden, labels

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        # One gather for each batch: a thousand rows one by one take longer than the step they feed.
        rows = torch.tensor(indices)
        return {"hidden": self.hidden[rows].float(), "concept_labels": self.labels[rows].float()}


class SaeObjective(nn.Module):
    """`reconstruction + conditioning_weight * conditioning + sparsity_weight * sparsity`, as a model with a loss.

    SCAR's objective (https://huggingface.co/papers/2411.07122): both weights of its top-k form are 1 and 0.
    """

    def __init__(self, sae: SparseAutoencoder, conditioning_weight: float, sparsity_weight: float) -> None:
        super().__init__()
        self.sae = sae
        self.weights = {"reconstruction": 1.0, "conditioning": conditioning_weight, "sparsity": sparsity_weight}

    def forward(self, hidden: Tensor, concept_labels: Tensor) -> dict[str, Tensor]:
        terms = self.sae.losses(hidden, concept_labels=concept_labels)
        return {"loss": sum((self.weights[name] * terms[name] for name in terms), hidden.new_zeros(()))}


class ProgressCallback(TrainerCallback):
    """Report every step to a function `(step, total_steps)`."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps)


@torch.no_grad()
def point_latent_at(sae: SparseAutoencoder, latent: int, direction: Tensor) -> None:
    """Set the encoder column and decoder row of `latent` to a direction, (d_in,), of norm 1.

    A latent gets a reconstruction gradient only where it is among the top k. One that starts along the concept wins
    its place on the concept's tokens early, so that its decoder row, which steers, is fitted too.
    """
    if not bool(direction.norm() > 0):
        raise ValueError(f"`direction` must not be zero or NaN. Received: norm {float(direction.norm())!r}.")
    unit = (direction / direction.norm()).to(sae.W_dec)
    sae.W_dec[latent] = unit
    if not sae.config.tied:
        sae.W_enc[:, latent] = unit


def usual_norm(hidden: Tensor, limit: float = 10.0) -> Tensor:
    """Rows whose norm is at most `limit` times the median, (n_tokens,) bool.

    A few tokens (often the first) carry activations a hundred times the usual ("Massive activations in large language
    models", https://huggingface.co/papers/2402.17762); they say nothing of the text and would own every mean.
    """
    norms = hidden.float().norm(dim=-1)
    return norms <= limit * norms.median()


def fit_conditioned_sae(
    sae: SparseAutoencoder,
    hidden: Tensor,
    labels: Tensor,
    *,
    steps: int,
    tokens_per_step: int = 1024,
    learning_rate: float = 1e-3,
    conditioning_weight: float = 1.0,
    sparsity_weight: float = 0.0,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Train `sae` in place on hidden states; its concept latents learn to detect.

    The bias starts at the data's mean and each concept's latent at its DiffMean direction. AdamW without weight decay,
    learning rate warmed up over 5 % of the steps, then along a cosine to 0.

    Args:
        sae: with at least one concept in `config.concepts`; on the device to train on.
        hidden: (n_tokens, d_in), any float dtype; rows of unusual norm are left out.
        labels: (n_tokens, n_concepts) in the order of `config.concepts`: 1 present, 0 absent, -100 unknown.
        steps: optimizer steps.
        tokens_per_step: rows drawn, without replacement within an epoch, for a step.
        report: called with (step, steps) after every step.

    Returns:
        `loss`: mean training loss; `tokens`: rows used; `left_out`: rows of unusual norm.

    Raises:
        ValueError: shapes do not fit the SAE, a value is not finite, or a count is below 1.
    """
    concepts = list(sae.config.concepts.values())
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
    data = HiddenStateBatches(hidden[usual], labels[usual])
    sae.initialize_from_data(data.hidden.float())
    for column, latent in enumerate(concepts):
        known = data.labels[:, column] != -100
        point_latent_at(sae, latent, fit_diffmean(data.hidden[known], data.labels[known, column]))
    sae.requires_grad_(True)
    tokens_per_step = min(tokens_per_step, len(data))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=tokens_per_step,
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * steps),
            weight_decay=0.0,
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
            use_cpu=sae.device.type == "cpu",
        )
        trainer = Trainer(
            model=SaeObjective(sae, conditioning_weight, sparsity_weight),
            args=arguments,
            train_dataset=data,
            data_collator=_as_is,  # pyright: ignore[reportArgumentType]
            callbacks=[ProgressCallback(report)] if report else None,
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    sae.eval()
    return {"loss": result.training_loss, "tokens": len(data), "left_out": int((~usual).sum())}


def _as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
