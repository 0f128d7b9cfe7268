"""How good a classifier is, and whether one is better than another: metrics, paired tests, intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .detection.metrics import auroc
from .fresh_intervals import t_quantile

OBJECTIVES = ("binary", "multi_class", "multi_label", "pairwise")
ALTERNATIVES = ("two-sided", "greater", "less")
BINS = 15  # of the expected calibration error, as in its paper


def classification_metrics(logits: Tensor, labels: Tensor | None, objective: str) -> dict[str, float]:
    """Accuracy, F1, AUROC and calibration of a classifier's logits.

    The names say the same for every objective; what they average over differs.

    - `binary`: logits (n,) or (n, 1), labels (n,) 0 or 1. Predicted is 1 where the logit exceeds 0. `f1` of class 1.
    - `multi_class`: logits (n, n_classes), labels (n,) class indices. `f1` is `macro_f1`; AUROC one class against the
      rest, averaged over classes that occur.
    - `multi_label`: logits and labels (n, n_labels). `accuracy`, `ece` and `brier` over all n * n_labels decisions;
      F1 and AUROC averaged over labels.
    - `pairwise`: logits (n, 2), the scores of the chosen and of the rejected, labels None. A pair is right where the
      chosen one scores more; F1 as SelfReg (https://huggingface.co/papers/2502.14133) has it, of labels [1; 0] and
      predictions [chosen > rejected; rejected > chosen]; AUROC of chosen against rejected over all pairs; calibration
      of sigmoid(chosen - rejected).

    Returns:
        accuracy, f1, macro_f1, auroc (nan where a class is missing), ece (see `calibration_error`) and brier: the mean
        squared error of the probability, for `multi_class` summed over classes (Brier 1950,
        https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2).

    Raises:
        ValueError: an unknown objective, shapes that do not fit it, a logit that is not finite, an unknown label.
    """
    logits, labels = checked(logits, labels, objective)
    if objective == "pairwise":
        right = torch.cat([logits[:, 0] > logits[:, 1], logits[:, 1] > logits[:, 0]])
        wanted = torch.cat([torch.ones(len(logits)), torch.zeros(len(logits))]).long()
        f1 = f1_scores(right.long(), wanted, 2)
        probability = torch.sigmoid(logits[:, 0] - logits[:, 1])
        confidence, correct = torch.maximum(probability, 1 - probability), probability > 0.5
        result = [
            pairwise_accuracy(logits[:, 0], logits[:, 1]),
            f1[1],
            f1.mean(),
            _auroc(logits.T.reshape(-1), wanted),
        ]
        return _named(*result, calibration_error(confidence, correct), (1 - probability).square().mean())
    predicted = predictions(logits, objective)
    if objective == "multi_class":
        n_classes, probability = logits.shape[1], logits.softmax(-1)
        f1 = f1_scores(predicted, labels, n_classes)
        areas = [_auroc(logits[:, c] - _rest(logits, c), (labels == c).long()) for c in range(n_classes)]
        brier = (probability - F.one_hot(labels, n_classes)).square().sum(-1).mean()
        correct = predicted == labels
        ece = calibration_error(probability.max(-1).values, correct)
        return _named(correct.double().mean(), f1.mean(), f1.mean(), _known_mean(areas), ece, brier)
    probability = torch.sigmoid(logits)
    correct = (predicted == labels).reshape(-1)
    ece = calibration_error(torch.maximum(probability, 1 - probability).reshape(-1), correct)
    brier = (probability - labels).square().mean()
    if objective == "binary":
        f1 = f1_scores(predicted, labels, 2)
        return _named(correct.double().mean(), f1[1], f1.mean(), _auroc(logits, labels), ece, brier)
    columns = range(logits.shape[1])
    f1 = torch.stack([f1_scores(predicted[:, c], labels[:, c], 2)[1] for c in columns]).mean()
    areas = [_auroc(logits[:, c], labels[:, c]) for c in columns]
    return _named(correct.double().mean(), f1, f1, _known_mean(areas), ece, brier)


def checked(logits: Tensor, labels: Tensor | None, objective: str) -> tuple[Tensor, Tensor]:
    """Logits as float64 and labels as int64 on the CPU, in the shapes of `classification_metrics`; or ValueError."""
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}. Received: objective={objective!r}.")
    logits = logits.detach().cpu().double()
    if objective == "binary" and logits.ndim == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    n = len(logits) if logits.ndim else 0
    if objective == "pairwise":
        fits = logits.ndim == 2 and logits.shape[1] == 2 and labels is None
        labels = torch.zeros(n)
    else:
        expected = logits.shape if objective == "multi_label" else (n,)
        fits = labels is not None and logits.ndim == (1 if objective == "binary" else 2) and labels.shape == expected
    if labels is None or not fits or not n:
        raise ValueError(
            f"Logits and labels do not fit objective={objective!r}; see `classification_metrics`. "
            f"Received: logits {tuple(logits.shape)}, labels {None if labels is None else tuple(labels.shape)}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"`logits` must be finite. Received: {int((~logits.isfinite()).sum())} that are not.")
    whole = labels.detach().cpu().long()
    top = logits.shape[1] - 1 if objective == "multi_class" else 1
    if not bool((whole == labels.detach().cpu()).all()) or int(whole.min()) < 0 or int(whole.max()) > top:
        raise ValueError(
            f"`labels` must be whole, 0 to {top}. Received: {sorted(set(labels.reshape(-1).tolist()))[:5]}."
        )
    return logits, whole


def predictions(logits: Tensor, objective: str) -> Tensor:
    """Class indices (n,) of `multi_class`; else 1 where a logit exceeds 0, in the shape of `logits`, int64."""
    return logits.argmax(-1) if objective == "multi_class" else (logits > 0).long()


def f1_scores(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """F1 of each class, `2 TP / (predicted + actual)`; 0 where a class is neither predicted nor there.

    Args:
        predicted, labels: (n,) int64 class indices.

    Returns:
        (n_classes,) float64.
    """
    hits = torch.bincount(labels[predicted == labels], minlength=n_classes).double()
    both = torch.bincount(predicted, minlength=n_classes) + torch.bincount(labels, minlength=n_classes)
    return 2 * hits / both.clamp(min=1)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: sum over bins of (share of texts) * |accuracy - mean confidence|.

    Bins of equal width (i / bins, (i + 1) / bins] of the predicted class's probability; "On Calibration of Modern
    Neural Networks" (https://huggingface.co/papers/1706.04599), equation 3.

    Args:
        confidence: (n,), 0 to 1.
        correct: (n,) bool.
    """
    confidence, correct = confidence.detach().cpu().double(), correct.detach().cpu().double()
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, correct - confidence)
    return float(gaps.abs().sum() / len(confidence))


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs whose chosen text scores more than the rejected one; a tie is wrong.

    Args:
        chosen, rejected: (n,) scores.

    Raises:
        ValueError: shapes differ or there is no pair.
    """
    if chosen.shape != rejected.shape or chosen.ndim != 1 or not len(chosen):
        raise ValueError(
            f"Expected two rows of scores (n,), n at least 1. "
            f"Received: chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}."
        )
    return float((chosen > rejected).double().mean())


class PairedTest(NamedTuple):
    """t: statistic, of `degrees` degrees of freedom; p: value; difference: mean of a - b."""

    t: float
    p: float
    degrees: int
    difference: float


def paired_t_test(a: Sequence[float], b: Sequence[float], alternative: str = "greater") -> PairedTest:
    """Student's t-test on the differences of pairs, such as two methods' scores with the same seeds.

    t = mean(a - b) / (std(a - b) / sqrt(n)), n - 1 degrees of freedom (Student 1908, https://doi.org/10.2307/2331554).
    SelfReg (https://huggingface.co/papers/2502.14133) tests one-sided, `greater`.

    Args:
        a, b: n numbers each, 2 or more, in the same order.
        alternative: the claim to be tested: a is `greater` or `less` than b, or differs (`two-sided`).

    Returns:
        The test. Where all differences are the same number, t is infinite, or nan (with p) if that number is 0.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"Expected two rows of one length, 2 or more. Received: {len(a)} and {len(b)} numbers.")
    if alternative not in ALTERNATIVES:
        raise ValueError(
            f"`alternative` must be one of {', '.join(ALTERNATIVES)}. Received: alternative={alternative!r}."
        )
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    degrees, centre, spread = len(a) - 1, mean(differences), stdev(differences)
    if spread == 0:
        t = math.copysign(math.inf, centre) if centre else math.nan
    else:
        t = centre / (spread / math.sqrt(len(a)))
    p = {"greater": student_tail(t, degrees), "less": student_tail(-t, degrees)}.get(
        alternative, 2 * student_tail(abs(t), degrees)
    )
    return PairedTest(t, p, degrees, centre)


def student_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's distribution: half the regularised incomplete beta I_x(degrees / 2, 1 / 2),
    x = degrees / (degrees + t^2) (https://dlmf.nist.gov/8.17)."""
    if math.isnan(t):
        return math.nan
    half = 0.5 * _incomplete_beta(degrees / 2, 0.5, 0.0 if math.isinf(t) else degrees / (degrees + t * t))
    return half if t >= 0 else 1 - half


def bootstrap_interval(
    values: Tensor | Sequence[Tensor],
    statistic: Callable[..., float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic under resampling of rows with replacement.

    Efron 1979 (https://doi.org/10.1214/aos/1176344552).

    Args:
        values: (n, ...), or several of one length whose rows belong together, such as logits and labels.
        statistic: called with the resampled `values`, each as its own argument; the mean by default. A resample for
            which it gives nan does not count.
        level: share of the resamples inside.
        resamples: number of them.

    Raises:
        ValueError: no rows, lengths that differ, a level outside (0, 1), or a statistic that is nan throughout.
    """
    columns = [values] if isinstance(values, Tensor) else list(values)
    n = len(columns[0]) if columns and columns[0].ndim else 0
    if not n or any(len(column) != n for column in columns):
        raise ValueError(f"Expected tensors of one length, 1 or more. Received: {[list(c.shape) for c in columns]}.")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"`level` must be inside (0, 1), `resamples` 1 or more. "
            f"Received: level={level!r}, resamples={resamples!r}."
        )
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(resamples):
        rows = torch.randint(n, (n,), generator=generator)
        drawn = [column[rows.to(column.device)] for column in columns]
        found.append(float(statistic(*drawn)) if statistic else float(drawn[0].double().mean()))
    known = torch.tensor([x for x in found if not math.isnan(x)], dtype=torch.float64)
    if not len(known):
        raise ValueError(f"`statistic` must give numbers. Received: nan for all {resamples} resamples.")
    low, high = known.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Tensor, *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """The mean of (n,) numbers, `value`, and its 95 % bootstrap interval, `low` and `high`."""
    low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
    return {"value": float(values.mean()), "low": low, "high": high}


class Summary(NamedTuple):
    """Over n runs: mean, std (of a sample, n - 1) and the 95 % interval of the mean, [low, high]; nan for one run."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    """Each metric over runs that differ in their seed. The interval is Student's, mean +- t * std / sqrt(n).

    Runs where a metric is NaN (it is undefined there) are left out of it; n says how many remain.

    Args:
        rows: one mapping a run, all with the same names.

    Raises:
        ValueError: no row, or rows whose names differ.
    """
    if not rows or any(set(row) != set(rows[0]) for row in rows):
        raise ValueError(f"Expected rows with the same names, 1 or more. Received: {[sorted(row) for row in rows]}.")
    result = {}
    for name in rows[0]:
        values = [float(row[name]) for row in rows if not math.isnan(row[name])]
        n, centre = len(values), mean(values) if values else math.nan
        std = stdev(values) if n > 1 else math.nan
        half = t_quantile(0.975, n - 1) * std / math.sqrt(n) if n > 1 else math.nan
        result[name] = Summary(centre, std, centre - half, centre + half, n)
    return result


def _named(*values: float | Tensor) -> dict[str, float]:
    names = ("accuracy", "f1", "macro_f1", "auroc", "ece", "brier")
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _auroc(scores: Tensor, labels: Tensor) -> float:
    return auroc(scores, labels) if 0 < int(labels.sum()) < len(labels) else math.nan


def _rest(logits: Tensor, column: int) -> Tensor:
    """log-sum-exp of the other classes: subtracted, it orders texts as the class's probability does."""
    return torch.cat([logits[:, :column], logits[:, column + 1 :]], -1).logsumexp(-1)


def _known_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return mean(known) if known else math.nan


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (https://dlmf.nist.gov/8.17.E22), evaluated as Lentz does."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = 1 + term / c or tiny, 1 / (1 + term * d or tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
