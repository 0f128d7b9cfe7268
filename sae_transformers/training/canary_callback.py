"""A canary in any Hugging Face `Trainer`: read while it trains, logged, and heeded."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import Trainer, TrainerCallback

from ..evaluation.canary import CanaryReading, FeatureCanary


def watch_canary(trainer: Trainer, canary: FeatureCanary, *, every: int = 50, stop: bool = True) -> CanaryCallback:
    """Measure a canary every so many steps and at the end, log what it finds, and stop when it has fallen; before
    `trainer.train()`.

    Works with `Trainer` and its children, such as TRL's, and for a model inside PEFT's.

    Args:
        every: optimizer steps.
        stop: end the training when the canary has fallen. Either way that is a warning, and `callback.reasons`.

    Raises:
        ValueError: `every` is below 1.
    """
    if every < 1:
        raise ValueError(f"`every` must be a count of steps. Received: every={every!r}.")
    callback = CanaryCallback(canary, every=every, stop=stop)
    trainer.callback_handler.callbacks.insert(0, callback)  # before those that report
    return callback


class CanaryCallback(TrainerCallback):
    """readings: (step, what was found) of each time. reasons: why it fell, none while it has not."""

    def __init__(self, canary: FeatureCanary, *, every: int = 50, stop: bool = True) -> None:
        self.canary, self.every, self.stop = canary, every, stop
        self.readings: list[tuple[int, CanaryReading]] = []
        self.reasons: list[str] = []
        self._unlogged: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        reading = self.canary.measure(model)
        self.readings.append((state.global_step, reading))
        self._unlogged = reading.numbers()
        control.should_log = True
        if reasons := self.canary.fallen(reading):
            self.reasons = reasons
            warnings.warn(
                f"The canary has fallen at step {state.global_step}: {' '.join(reasons)}"
                f"{' Training stops here.' if self.stop else ''}",
                stacklevel=2,
            )
            control.should_training_stop = control.should_training_stop or self.stop

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or not self._unlogged:
            return
        for record in (logs, state.log_history[-1]):
            record.update({name: round(value, 6) for name, value in self._unlogged.items()})
        self._unlogged = {}
