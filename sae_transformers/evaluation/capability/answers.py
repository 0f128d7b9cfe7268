"""Answers of a model to lm-eval's tasks, and the measurements that come of them, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..intervals import measured, resample_counts
from ..journal import Journal, result_of
from ..results import Measurement
from ..settings import BootstrapSettings
from .lm_eval import run_tasks
from .tasks import LAMBADA


class Answers:
    """To n rows of one task. right: (n,) float64, 0 or 1. log_p: (n, choices) float64, in nats."""

    def __init__(self, right: Sequence[float], log_p: Sequence[Sequence[float]]) -> None:
        self.right, self.log_p = (torch.tensor(values, dtype=torch.float64) for values in (right, log_p))


def answers_to(harness: Any, task: str, folder: str, told: Mapping[str, Any], journal: Journal | None) -> Answers:
    """The answers to a task; told: what they depend on, `limit` among it."""

    def ask() -> dict[str, Any]:
        samples = run_tasks(harness, [task], folder, limit=told["limit"])["samples"][task]
        rows = sorted(samples, key=lambda row: row["doc_id"])
        return {
            "right": [float(row["acc"]) for row in rows],
            "log_p": [[float(one[0][0]) for one in row["resps"]] for row in rows],
        }

    return Answers(**result_of(journal, lambda: {**told, "task": task}, ask))


def answer_measurements(
    method: str,
    tasks: Mapping[str, Answers],
    without: Mapping[str, Answers] | None,
    bootstrap: BootstrapSettings,
) -> list[Measurement]:
    """Each number with its interval and, where `without` is given, its change against that on the same rows."""
    found = []
    parts = [[name] for name in tasks]
    if len(subjects := [name for name in tasks if name != LAMBADA]) > 1:
        parts.append(subjects)
    for names in parts:
        metric = "mmlu" if len(names) > 1 else names[0].removeprefix("local_")
        right = torch.cat([tasks[name].right for name in names])
        other = None if without is None else torch.cat([without[name].right for name in names])
        counts = resample_counts(len(right), bootstrap.resamples, bootstrap.seed)
        found += _pair(f"{metric}_accuracy", method, "higher", right, other, counts, _mean)
        if names == [LAMBADA]:
            log_p = tasks[LAMBADA].log_p[:, 0]
            other = None if without is None else without[LAMBADA].log_p[:, 0]
            found += _pair("lambada_perplexity", method, "lower", log_p, other, counts, _perplexity)
    return found


def _pair(
    metric: str, method: str, better: str, values: Tensor, other: Tensor | None, counts: Tensor,
    statistic: Callable[[Tensor, Tensor], Tensor],
) -> list[Measurement]:  # fmt: skip
    once = torch.ones(1, len(values), dtype=torch.float64)

    def one(name: str, of: Callable[[Tensor], Tensor]) -> Measurement:
        facts = {"n": len(values), "data": metric.split("_")[0], "better": better}
        return measured(name, of(once), method, of(counts), **facts)

    found = [one(metric, lambda c: statistic(c, values))]
    if other is not None:
        found.append(one(f"{metric}_change", lambda c: statistic(c, values) - statistic(c, other)))
    return found


def _mean(counts: Tensor, values: Tensor) -> Tensor:
    return counts @ values / len(values)


def _perplexity(counts: Tensor, log_p: Tensor) -> Tensor:
    return (-_mean(counts, log_p)).exp()


def largest_difference(method: str, tasks: Mapping[str, Answers], base: Mapping[str, Answers]) -> Measurement:
    """Of any log-likelihood to the base's."""
    largest = max(float((one.log_p - base[name].log_p).abs().max()) for name, one in tasks.items())
    n = sum(one.log_p.numel() for one in tasks.values())
    return Measurement("log_likelihood_difference", largest, method, n=n, note="largest to the base, in nats")
