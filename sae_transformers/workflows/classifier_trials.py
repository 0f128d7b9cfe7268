"""Trials of `classify` that a stopped run had done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

from torch import Tensor

from ..evaluation.journal import Watch, result_of
from ..training.heads.settings import HeadSettings
from ..training.heads.train import TrainedHead
from .classifier_candidates import Way
from .classifier_verdict import Trial

WEIGHTS = ("weight", "bias", "hidden_weight", "hidden_bias")


def trial_of(way: Way, run: Callable[[], Trial], watch: Watch) -> Trial:
    """What `run` gives, or gave before: its measures as numbers, its head as tensors."""
    if watch.journal is None:
        return run()
    ran = cache(run)
    weights = watch.keep(["head", *way], lambda: _weights(ran().head))
    told = result_of(watch.journal, lambda: ["trial", *way], lambda: _told(ran()))
    return Trial(told["rows"], _head(weights, told["head"]))


def _weights(head: TrainedHead) -> dict[str, Tensor]:
    tensors = {name: getattr(head, name) for name in WEIGHTS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _told(trial: Trial) -> dict[str, Any]:
    head = trial.head
    numbers = {name: getattr(head, name) for name in ("objective", "seed", "history", "best_epoch")}
    numbers |= {"validation_score": head.validation_score, "settings": asdict(head.settings)}
    return {"rows": trial.rows, "head": numbers}


def _head(weights: Any, told: dict[str, Any]) -> TrainedHead:
    settings = dict(told["settings"])
    if settings["class_weights"] is not None:
        settings["class_weights"] = tuple(settings["class_weights"])
    return TrainedHead(
        **{name: weights.get(name) for name in WEIGHTS}, **{**told, "settings": HeadSettings(**settings)}
    )
