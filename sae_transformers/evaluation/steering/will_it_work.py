"""Will a steering do too little, work, or break the text? A calibrated answer from its first tokens, or none.

forecaster = SteeringForecaster.fit(signs, outcomes, concepts)
forecast = will_it_work(model, tokenizer, steering, prompts, forecaster)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy

from ...latents.optional_packages import needs
from ..settings import FluencyBudget
from .early_signs import early_signs

OUTCOMES = ("under", "success", "over")
FOLDS = 5
TEMPERATURES = numpy.geomspace(0.25, 8.0, 61)
FORMAT = "sae_transformers.steering_forecaster/1"


class Forecast(NamedTuple):
    """under, success, over: probabilities, which sum to 1. outcome: the most likely, or None: it abstains.
    possible: the outcomes that are not ruled out at the forecaster's level; it abstains unless that is one."""

    under: float
    success: float
    over: float
    outcome: str | None
    possible: tuple[str, ...]


def steering_outcome(
    effect: float, perplexity_ratio: float, added_repetition: float, *, least_effect: float, budget: FluencyBudget
) -> str:
    """`over` where the text costs more than the budget, else `success` where the effect is there, else `under`.

    Args:
        effect: change of the score towards the goal.
        perplexity_ratio, added_repetition: of the continuations, as `FluencyBudget` bounds them.
        least_effect: that counts as success.
    """
    most = math.inf if budget.added_repetition is None else budget.added_repetition
    if perplexity_ratio > budget.perplexity_ratio or added_repetition > most:
        return "over"
    return "success" if effect >= least_effect else "under"


@dataclass(frozen=True)
class SteeringForecaster:
    """Multinomial logistic regression on standardised signs, calibrated on concepts that it was not fitted to.

    Args:
        names: of the signs, in the order of the weights.
        mean, scale: (d,) of each sign. weights: (3, d); bias: (3,), in the order of `OUTCOMES`.
        temperature: what logits are divided by (https://huggingface.co/papers/1706.04599).
        least: an outcome of a smaller probability is ruled out (split conformal prediction): the true one stays, on
            average, in a share `level` of steerings of concepts like the held-out ones.
        level: of that share.
        steerings, concepts: that it was fitted to.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    temperature: float
    least: float
    level: float
    steerings: int
    concepts: int

    @classmethod
    def fit(
        cls,
        signs: Sequence[Mapping[str, float]],
        outcomes: Sequence[str],
        concepts: Sequence[str],
        *,
        level: float = 0.9,
        strength: float = 1.0,
    ) -> SteeringForecaster:
        """Fit to steerings whose outcome is known.

        Args:
            signs: of each, of `early_signs` and perhaps `difference_agreement`; all of the same names.
            outcomes: of each, of `OUTCOMES`.
            concepts: of each; two or more different ones, held out in turn for the calibration.
            level: of the outcomes that are not ruled out.
            strength: inverse of the L2 penalty.

        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: lengths or names differ, a number that is not finite, an unknown outcome, one outcome or one
                concept alone.
        """
        names, rows, labels = _checked(signs, outcomes, concepts)
        if not 0 < level < 1:
            raise ValueError(f"`level` must lie between 0 and 1. Received: level={level!r}.")
        held = numpy.empty((len(rows), len(OUTCOMES)))
        different = list(dict.fromkeys(concepts))
        numbers = numpy.array([different.index(one) % min(FOLDS, len(different)) for one in concepts])
        for fold in range(numbers.max() + 1):
            inside = numbers != fold
            if len(set(labels[inside])) < 2:  # nothing to tell apart: all the probability is on what there is
                held[~inside] = numpy.where(numpy.arange(len(OUTCOMES)) == labels[inside][0], 0.0, -10.0)
                continue
            held[~inside] = _Regression.fit(rows[inside], labels[inside], strength).logits(rows[~inside])
        losses = [-_log_softmax(held / t)[numpy.arange(len(labels)), labels].mean() for t in TEMPERATURES]
        temperature = float(TEMPERATURES[int(numpy.argmin(losses))])
        true = numpy.sort(numpy.exp(_log_softmax(held / temperature))[numpy.arange(len(labels)), labels])
        place = math.floor(round((1 - level) * (len(true) + 1), 9))
        whole = _Regression.fit(rows, labels, strength)
        return cls(
            names, _plain(whole.mean), _plain(whole.scale), tuple(map(_plain, whole.weights)), _plain(whole.bias),
            temperature, float(true[place - 1]) if place else 0.0, level, len(rows), len(different),
        )  # fmt: skip

    def forecast(self, signs: Mapping[str, float]) -> Forecast:
        """What the signs of a steering say.

        Raises:
            ValueError: other names than those it was fitted to, or a number that is not finite.
        """
        if set(signs) != set(self.names) or not all(math.isfinite(value) for value in signs.values()):
            raise ValueError(f"Expected finite numbers of the names {sorted(self.names)}. Received: {dict(signs)!r}.")
        scaled = (numpy.array([signs[name] for name in self.names]) - self.mean) / self.scale
        logits = (numpy.array(self.weights) @ scaled + self.bias) / self.temperature
        under, success, over = numpy.exp(_log_softmax(logits[None]))[0].tolist()
        likely = zip(OUTCOMES, (under, success, over), strict=True)
        possible = tuple(name for name, value in likely if value >= self.least)
        return Forecast(under, success, over, possible[0] if len(possible) == 1 else None, possible)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SteeringForecaster:
        """What `to_dict` gave.

        Raises:
            ValueError: another format, or fields that are missing or unknown.
        """
        given = {**values}
        form, known = given.pop("format", None), {one.name for one in fields(cls)}
        if form != FORMAT or set(given) != known:
            raise ValueError(
                f"Expected the format {FORMAT!r} with the fields {sorted(known)}. Received: format={form!r}, "
                f"fields {sorted(given)}."
            )
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return cls(**{**given, **lists, "weights": tuple(tuple(row) for row in given["weights"])})


def will_it_work(
    model: Any,
    tokenizer: Any,
    steering: Any,
    prompts: Sequence[str],
    forecaster: SteeringForecaster,
    *,
    differences: Mapping[str, float] | None = None,
) -> Forecast:
    """Forecast what a steering will do to texts, from the first tokens of a few.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        steering: a `Steering`, its dict or its JSON.
        prompts: a few of those that it is for.
        forecaster: fitted on the same model and the same kind of prompts: its probabilities hold for no other.
        differences: of `difference_agreement`, where the forecaster was fitted to them.

    Raises:
        ValueError: as `early_signs`, and `SteeringForecaster.forecast`.
    """
    return forecaster.forecast({**early_signs(model, tokenizer, prompts, steering), **(differences or {})})


class UnseenConcepts(NamedTuple):
    """Forecasts of each concept by a forecaster that was fitted to the others.

    macro_f1: of the most likely outcome. majority_macro_f1: of the most frequent outcome of the others. accuracy,
    majority_accuracy: likewise. coverage: share whose outcome was not ruled out. abstained: share without an answer.
    accuracy_answered: of the rest; None where there is none. log_loss: nats. forecasts: of each steering.
    """

    macro_f1: float
    majority_macro_f1: float
    accuracy: float
    majority_accuracy: float
    coverage: float
    abstained: float
    accuracy_answered: float | None
    log_loss: float
    forecasts: list[Forecast]


def on_unseen_concepts(
    signs: Sequence[Mapping[str, float]], outcomes: Sequence[str], concepts: Sequence[str], **options: float
) -> UnseenConcepts:
    """Leave one concept out, fit to the others, forecast it; for every concept.

    Args:
        signs, outcomes, concepts: as `SteeringForecaster.fit`, three concepts or more.
        options: of `SteeringForecaster.fit`.
    """
    _checked(signs, outcomes, concepts)
    found: list[Forecast | None] = [None] * len(signs)
    majority = [""] * len(signs)
    for concept in dict.fromkeys(concepts):
        inside = [i for i, one in enumerate(concepts) if one != concept]
        others = [outcomes[i] for i in inside]
        fitted = SteeringForecaster.fit([signs[i] for i in inside], others, [concepts[i] for i in inside], **options)
        for i in (i for i, one in enumerate(concepts) if one == concept):
            found[i], majority[i] = fitted.forecast(signs[i]), max(OUTCOMES, key=others.count)
    forecasts = [one for one in found if one is not None]
    likely = [OUTCOMES[int(numpy.argmax(one[:3]))] for one in forecasts]
    answered = [one.outcome == true for one, true in zip(forecasts, outcomes, strict=True) if one.outcome is not None]
    return UnseenConcepts(
        macro_f1(likely, outcomes), macro_f1(majority, outcomes), _share(likely, outcomes), _share(majority, outcomes),
        sum(true in one.possible for one, true in zip(forecasts, outcomes, strict=True)) / len(forecasts),
        1 - len(answered) / len(forecasts), sum(answered) / len(answered) if answered else None,
        -sum(math.log(max(getattr(one, true), 1e-12)) for one, true in zip(forecasts, outcomes, strict=True))
        / len(forecasts), forecasts,
    )  # fmt: skip


def macro_f1(said: Sequence[str], true: Sequence[str]) -> float:
    """Mean F1 of the outcomes that occur in `true`."""
    scores = []
    for name in sorted(set(true)):
        hits = sum(a == b == name for a, b in zip(said, true, strict=True))
        scores.append(2 * hits / (said.count(name) + true.count(name)))
    return sum(scores) / len(scores)


def _share(said: Sequence[str], true: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(said, true, strict=True)) / len(true)


class _Regression(NamedTuple):
    mean: Any
    scale: Any
    weights: Any
    bias: Any

    @classmethod
    def fit(cls, rows: Any, labels: Any, strength: float) -> _Regression:
        with needs("A forecaster", "scikit-learn", "evaluation"):
            from sklearn.linear_model import LogisticRegression
        mean, scale = rows.mean(0), rows.std(0)
        scale = numpy.where(scale > 0, scale, 1.0)
        found = LogisticRegression(C=strength, max_iter=2000).fit((rows - mean) / scale, labels)
        weights, bias = numpy.zeros((len(OUTCOMES), rows.shape[1])), numpy.full(len(OUTCOMES), -10.0)
        if len(found.classes_) == 2:  # scikit-learn gives the logit of the second alone
            first, second = found.classes_
            weights[second], bias[first], bias[second] = found.coef_[0], 0.0, found.intercept_[0]
        else:
            weights[found.classes_], bias[found.classes_] = found.coef_, found.intercept_
        return cls(mean, scale, weights, bias)

    def logits(self, rows: Any) -> Any:
        return (rows - self.mean) / self.scale @ self.weights.T + self.bias


def _checked(
    signs: Sequence[Mapping[str, float]], outcomes: Sequence[str], concepts: Sequence[str]
) -> tuple[tuple[str, ...], Any, Any]:
    """Names, (n, d) numbers and (n,) places in `OUTCOMES`."""
    if not len(signs) == len(outcomes) == len(concepts) or not signs:
        raise ValueError(
            f"Expected an outcome and a concept for each of the signs. Received: {len(signs)} signs, {len(outcomes)} "
            f"outcomes, {len(concepts)} concepts."
        )
    if unknown := sorted(set(outcomes) - set(OUTCOMES)):
        raise ValueError(f"Outcomes are {', '.join(OUTCOMES)}. Received: {unknown}.")
    names = tuple(signs[0])
    if other := [i for i, row in enumerate(signs) if set(row) != set(names)]:
        raise ValueError(f"All signs need the names {sorted(names)}. Received: {sorted(signs[other[0]])} in one.")
    rows = numpy.array([[row[name] for name in names] for row in signs], dtype=float)
    if not numpy.isfinite(rows).all():
        raise ValueError(f"Signs must be finite. Received: {int((~numpy.isfinite(rows)).sum())} that are not.")
    if len(set(outcomes)) < 2 or len(set(concepts)) < 2:
        raise ValueError(
            f"Expected two outcomes and two concepts or more. Received: {sorted(set(outcomes))} of "
            f"{len(set(concepts))} concepts."
        )
    return names, rows, numpy.array([OUTCOMES.index(one) for one in outcomes])


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - numpy.log(numpy.exp(shifted).sum(-1, keepdims=True))


def _plain(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
