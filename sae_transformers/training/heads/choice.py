"""Which of several ways of keeping a classifier off an attribute: one rule, on validation alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Label = TypeVar("Label", bound=Hashable)
Measures = Sequence[Mapping[str, float]]  # a row a seed


class Choice(NamedTuple):
    """What a way of training heads does on validation, beside plain heads: means over seeds.

    delta: of the change of the score when the attribute is swapped, in standard deviations of the scores, relative to
    the plain heads'; -0.3 is 30 % less. score: what it gains of the validation score; -0.01 is a point less.
    """

    delta: float
    score: float


def compare(rows: Measures, plain: Measures) -> Choice:
    """How heads compare with plain ones of the same seeds, by `validation` and `validation_delta` of their rows."""
    score, delta = (_mean(rows, name) for name in ("validation", "validation_delta"))
    base = _mean(plain, "validation_delta")
    return Choice(delta / base - 1 if base > 0 else 0.0, score - _mean(plain, "validation"))


def choose_on_validation(ways: Mapping[Label, Measures], plain: Measures, max_loss: float = 0.01) -> Label | None:
    """The way that moves least when the attribute is swapped, of those that lose at most `max_loss` of the score.

    Args:
        ways: rows of measures, one a seed, with `validation` and `validation_delta`.
        plain: those of heads that nothing is kept from.

    Returns:
        Its label; None where no way moves less than plain heads at that price.
    """
    compared = {label: compare(rows, plain) for label, rows in ways.items()}
    allowed = {label: one for label, one in compared.items() if one.score >= -max_loss and one.delta < 0}
    return min(allowed, key=lambda label: allowed[label].delta) if allowed else None


def _mean(rows: Measures, name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
