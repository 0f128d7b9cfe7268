"""Training of a `LearntCode` by `Trainer`, on answers to prompts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ...latents.progress import Progress
from .learnt_code import LearntCode
from .preference_losses import likelihood_loss, preference_loss, preference_margins
from .settings import LearnSteeringSettings

ANSWERS = ("chosen", "rejected")


class AnswerRow(NamedTuple):
    """Token ids of a prompt and of its answers; without preferences there is none that is rejected."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None = None


class Measured(NamedTuple):
    """Of rows under one steering: the loss of the training without its L1 term, and with preferences the share of
    rows where the chosen answer has gained on the rejected one, against the base."""

    loss: float
    preferred: float | None


def collated(rows: Sequence[AnswerRow]) -> dict[str, Tensor]:
    """Rows as a batch: the chosen answers, then the rejected ones, padded on the right."""
    texts = [(row.prompt, row.chosen) for row in rows]
    texts += [(row.prompt, row.rejected) for row in rows if row.rejected is not None]
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in texts]
    lengths, starts = torch.tensor([len(one) for one in ids]), torch.tensor([len(prompt) for prompt, _ in texts])
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": real.long(),
        "response": real & (columns >= starts[:, None]),
        "prompt_lengths": starts,
    }


@torch.no_grad()
def base_log_probs(code: LearntCode, rows: Sequence[AnswerRow], batch_size: int) -> Tensor:
    """Log-probabilities of all answers under the unsteered model, (n, 2), or (n, 1) without rejected ones."""
    parts = []
    for members in _batches(len(rows), batch_size):
        batch = [rows[i] for i in members]
        parts.append(code(**collated(batch), sign=None).view(-1, len(batch)).T.cpu())
    return torch.cat(parts)


def losses(
    code: Any, batch: dict[str, Tensor], base: Tensor, settings: LearnSteeringSettings
) -> tuple[Tensor, Tensor | None]:
    """The loss of a batch and its margins (batch,), None without preferences.

    Args:
        code: a `LearntCode`, or what `Trainer` has wrapped it in.
        base: (batch, answers), of `base_log_probs`.
    """
    n = len(base)
    steered = code(**batch)
    if settings.loss == "likelihood":
        return likelihood_loss(steered, batch["response"].sum(-1).to(steered)), None
    chosen, rejected = base.to(steered).T
    margins = preference_margins(steered[:n], steered[n:], chosen, rejected)
    loss = preference_loss(margins, settings.beta)
    if settings.both_ways:
        against = code(**batch, sign=-1.0)
        opposite = -preference_margins(against[:n], against[n:], chosen, rejected)
        loss = (loss + preference_loss(opposite, settings.beta)) / 2
    return loss, margins


class _CodeTrainer(Trainer):
    """`Trainer` with the losses of a code in place of the model's own."""

    settings: LearnSteeringSettings

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        base = inputs.pop("base")
        loss, margins = losses(model, inputs, base, self.settings)
        if self.settings.l1:
            code: Any = self.accelerator.unwrap_model(model)
            loss = loss + self.settings.l1 * code.lengths(code.values).sum()
        return (loss, margins) if return_outputs else loss


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def train_code(
    code: LearntCode,
    rows: Sequence[AnswerRow],
    settings: LearnSteeringSettings,
    *,
    folder: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train the values of a code, in place; the model's own tensors have to be frozen (`frozen`).

    Args:
        folder: of checkpoints; training goes on from the last one in it. Without one nothing is kept.

    Returns:
        What was logged: loss and step.
    """
    known = base_log_probs(code, rows, settings.batch_size)

    def collate(members: list[int]) -> dict[str, Tensor]:
        return {**collated([rows[i] for i in members]), "base": known[members]}

    with tempfile.TemporaryDirectory() as nowhere:
        arguments = TrainingArguments(
            output_dir=str(folder or nowhere),
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            remove_unused_columns=False,
            save_strategy="no" if folder is None else "steps",
            save_steps=settings.save_steps,
            save_total_limit=1,
            logging_steps=settings.save_steps,
            report_to="none",
            disable_tqdm=True,
            seed=settings.seed,
            use_cpu=code.values.device.type == "cpu",
        )
        dataset: Any = range(len(rows))
        trainer = _CodeTrainer(
            model=code, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=list(callbacks)
        )
        trainer.settings = settings
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        if progress is not None:
            trainer.add_callback(_Report(progress))
        last = None if folder is None or not folder.is_dir() else get_last_checkpoint(str(folder))
        trainer.train(resume_from_checkpoint=last)
    names = ("step", "loss", "grad_norm", "learning_rate")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in names if name in entry} for entry in history]


@torch.no_grad()
def measured(code: LearntCode, rows: Sequence[AnswerRow], settings: LearnSteeringSettings) -> Measured:
    """Rows under the values as they are."""
    known = base_log_probs(code, rows, settings.batch_size)
    total = won = 0.0
    for members in _batches(len(rows), settings.batch_size):
        loss, margins = losses(code, collated([rows[i] for i in members]), known[members], settings)
        total += float(loss) * len(members)
        if margins is not None:
            won += float((margins > 0).sum())
    return Measured(total / len(rows), None if settings.loss == "likelihood" else won / len(rows))


def base_loss(code: LearntCode, rows: Sequence[AnswerRow], settings: LearnSteeringSettings) -> float:
    """The loss without steering; of preferences it is log 2 whatever the rows are."""
    if settings.loss == "preference":
        return math.log(2)
    known = base_log_probs(code, rows, settings.batch_size)[:, 0]
    return float(likelihood_loss(known, torch.tensor([len(row.chosen) for row in rows])))


def _batches(n: int, size: int) -> Iterator[list[int]]:
    for start in range(0, n, size):
        yield list(range(start, min(start + size, n)))
