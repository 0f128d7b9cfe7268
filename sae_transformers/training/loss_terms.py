"""Each term of a model's loss in the log of any Hugging Face `Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..modeling.modeling_sae import SaePreTrainedModel


def log_loss_terms(trainer: Trainer) -> LossTerms:
    """Log `lm_loss` and each loss of the SAEs beside `loss`, whatever `report_to` says; before `trainer.train()`.

    Works with `Trainer` and its children, such as TRL's `SFTTrainer`, and for a model inside PEFT's. Terms are without
    their weights, means as the logged loss is: over the steps since the last log, and over processes.

    Raises:
        ValueError: the trainer's model has no SAEs.
    """
    found = [module for module in _model_of(trainer).modules() if isinstance(module, SaePreTrainedModel)]
    if not found:
        raise ValueError(
            f"The terms are those of a model with SAEs. Received: a trainer of {type(trainer.model).__name__}."
        )
    terms = LossTerms(trainer)
    found[0].register_forward_hook(terms.take)
    if found[0] is not trainer.model:
        around = _model_of(trainer)
        around.register_forward_pre_hook(terms.expect)
        around.register_forward_hook(terms.take_if_missed)
    trainer.callback_handler.callbacks.insert(0, terms)  # before those that report
    return terms


class LossTerms(TrainerCallback):
    """Adds up what forward passes return, and puts it into the log."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.sums: dict[str, Tensor] = {}
        self.step = 0
        self.taken = False

    def expect(self, around: nn.Module, args: Any) -> None:
        self.taken = False

    def take_if_missed(self, around: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of what is around the model: PEFT before 0.21 calls `forward`, which runs no hooks."""
        if not self.taken:
            self.take(around, args, output)

    def take(self, model: nn.Module, args: Any, output: Any) -> None:
        """A forward hook: nothing waits for the device."""
        self.taken = True
        if not model.training or not hasattr(output, "lm_loss"):
            return
        terms = {**(output.sae_losses or {}), **({} if output.lm_loss is None else {"lm_loss": output.lm_loss})}
        # Without the whole batch's count each micro-batch gives a mean of its own, which Trainer divides likewise.
        share = 1 if self.trainer.model_accepts_loss_kwargs else self.trainer.current_gradient_accumulation_steps
        for name, value in terms.items():
            value = value.detach().float() / share
            self.sums[name] = value if name not in self.sums else self.sums[name] + value.to(self.sums[name].device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums, self.step = {}, state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        steps = state.global_step - self.step
        if logs is None or "loss" not in logs or not self.sums or not steps:
            return
        names = sorted(self.sums)
        values = torch.stack([self.sums[name].to(args.device) for name in names]) / steps
        gathered: Any = self.trainer.accelerator.gather(values[None])
        found = gathered.mean(0).tolist()
        for record in (logs, state.log_history[-1]):
            record.update({name: round(value, 6) for name, value in zip(names, found, strict=True)})
        self.sums, self.step = {}, state.global_step


def _model_of(trainer: Trainer) -> nn.Module:
    model = trainer.model
    if model is None:
        raise ValueError("The trainer has no model yet; give it one, not `model_init`.")
    return model
