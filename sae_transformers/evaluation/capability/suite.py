"""The suite `capability`: what a model can still do, by lm-evaluation-harness: LAMBADA and MMLU from local data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...modeling import Steering
from ..intervals import BOOTSTRAP, percentiles, resample_counts
from ..journal import Journal, result_of
from ..method_ids import MethodId, baseline_method
from ..results import Measurement, SuiteResult, with_methods
from ..settings import BootstrapSettings
from ..suites.settings import CapabilitySettings
from .lm_eval import harness_model, run_tasks
from .tasks import LAMBADA, MmluSubject, require_lm_eval, write_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM

BASE, UNSTEERED, DEFAULT = "base", "none", "default"


def capability_suite(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: CapabilitySettings | None = None,
    *,
    lambada: Sequence[str] = (),
    mmlu: Mapping[str, MmluSubject] | None = None,
    steerings: Mapping[str, Any] | None = None,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> SuiteResult:
    """Run lm-eval's LAMBADA and MMLU on a model without steering, with it, and on its bare base.

    lambada_accuracy      share of last words that are the most likely ones, token by token
    lambada_perplexity    exp of the mean negative log-probability of a last word
    mmlu_SUBJECT_accuracy share of questions whose right letter is the most likely one; mmlu_accuracy: of all subjects
    ..._change            the same less what it is without steering, on the same rows
    log_likelihood_difference  largest |difference| to the base of any log-likelihood; 0 for a model without steering

    The methods are `base`, `none` (the model, no steering) and the names of `steerings`. Prompts, answers and metrics
    are those of the installed lm-eval (https://github.com/EleutherAI/lm-evaluation-harness); LAMBADA is
    https://huggingface.co/papers/1606.06031, MMLU https://huggingface.co/papers/2009.03300.

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base.
        lambada: passages, of `read_lambada`; none to leave it out.
        mmlu: subject -> questions, of `read_mmlu`; none to leave it out.
        steerings: name -> `Steering`; by default the model's own as `default`, where it has one.
        report: called with the number of rows of each pass.
        journal: has the answers of methods to tasks that were done, and gets the others.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is nothing to ask, a name of a steering is taken, or
            steering that the model cannot do.
    """
    start, version = time.perf_counter(), require_lm_eval()
    settings = settings or CapabilitySettings()
    shots, limit, batch_size, base = settings.shots, settings.limit, settings.batch_size, settings.base
    if steerings is None:
        steerings = {DEFAULT: model.steering} if model.steering else {}
    if taken := {BASE, UNSTEERED} & set(steerings):
        raise ValueError(f"Steerings need names other than {BASE!r} and {UNSTEERED!r}. Received: {sorted(taken)}.")
    chosen = {name: Steering.coerce(steering) for name, steering in steerings.items()}
    prepared = {name: model.prepare_steering(steering) for name, steering in chosen.items()}
    methods: dict[str, tuple[Any, Any]] = {BASE: (model.lm, None)} if base else {}
    methods |= {UNSTEERED: (model, False)} | {name: (model, plan) for name, plan in prepared.items()}
    with tempfile.TemporaryDirectory(prefix="sae_transformers_") as folder:
        names = write_tasks(folder, lambada, mmlu, shots=shots)
        found = {}
        for name, (lm, steering) in methods.items():
            harness = harness_model(lm, tokenizer, steering=steering, batch_size=batch_size, report=report)
            told = {
                "method": name, "steering": chosen[name].to_dict() if name in chosen else None, "limit": limit,
                "shots": shots, "batch_size": batch_size,
            }  # fmt: skip
            found[name] = {task: _answers(harness, task, folder, told, journal) for task in names}
    measurements = []
    for method, tasks in found.items():
        without = found[UNSTEERED] if method in prepared else None
        measurements += _measurements(method, tasks, without, settings.bootstrap)
        if base and method != BASE:
            measurements.append(_difference(method, tasks, found[BASE]))
    known = [baseline_method("base", BASE), baseline_method("none", UNSTEERED)]
    measurements = with_methods(measurements, [*known, *(MethodId("steered", name) for name in prepared)])
    record = {
        "tasks": names, "shots": shots, "limit": limit, "batch_size": batch_size, **asdict(settings.bootstrap),
        "lm_eval": version,
        "rows": {name: len(next(iter(found.values()))[name].right) for name in names},
        "steerings": {name: steering.to_dict() for name, steering in chosen.items()},
    }  # fmt: skip
    notes = [
        f"Prompts and metrics are those of lm-eval {version} (lambada_openai, mmlu); the data is local.",
        "Texts begin as the tokenizer begins them; no chat template.",
    ]
    return SuiteResult("capability", record, measurements, notes=notes, seconds=time.perf_counter() - start)


class _Answers:
    """To n rows of one task. right: (n,) float64, 0 or 1. log_p: (n, choices) float64, in nats."""

    def __init__(self, right: Sequence[float], log_p: Sequence[Sequence[float]]) -> None:
        self.right, self.log_p = (torch.tensor(values, dtype=torch.float64) for values in (right, log_p))


def _answers(harness: Any, task: str, folder: str, told: Mapping[str, Any], journal: Journal | None) -> _Answers:
    """The answers to a task; told: what they depend on, `limit` among it."""

    def ask() -> dict[str, Any]:
        samples = run_tasks(harness, [task], folder, limit=told["limit"])["samples"][task]
        rows = sorted(samples, key=lambda row: row["doc_id"])
        return {
            "right": [float(row["acc"]) for row in rows],
            "log_p": [[float(one[0][0]) for one in row["resps"]] for row in rows],
        }

    return _Answers(**result_of(journal, lambda: {**told, "task": task}, ask))


def _measurements(
    method: str,
    tasks: Mapping[str, _Answers],
    without: Mapping[str, _Answers] | None,
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

    def measured(name: str, of: Callable[[Tensor], Tensor]) -> Measurement:
        low, high = percentiles(of(counts))
        return Measurement(
            name, float(of(once)), method, low, high, BOOTSTRAP, len(values), data=metric.split("_")[0], better=better
        )

    found = [measured(metric, lambda c: statistic(c, values))]
    if other is not None:
        found.append(measured(f"{metric}_change", lambda c: statistic(c, values) - statistic(c, other)))
    return found


def _mean(counts: Tensor, values: Tensor) -> Tensor:
    return counts @ values / len(values)


def _perplexity(counts: Tensor, log_p: Tensor) -> Tensor:
    return (-_mean(counts, log_p)).exp()


def _difference(method: str, tasks: Mapping[str, _Answers], base: Mapping[str, _Answers]) -> Measurement:
    largest = max(float((one.log_p - base[name].log_p).abs().max()) for name, one in tasks.items())
    n = sum(one.log_p.numel() for one in tasks.values())
    return Measurement("log_likelihood_difference", largest, method, n=n, note="largest to the base, in nats")
