"""Of a grid of cases, the part that the fast tests run: every value of every axis, and few pairs of values twice. The
other cases are marked `slow`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def covering(*axes: Iterable[Any], times: int = 1) -> list[Any]:
    """All combinations of the axes' values as parameters of a test, in the order of `itertools.product`.

    Fast are so many that every value is in at least `times` of them: one after another for each value of the longest
    axis, with those of the other axes that have met it, and each other, least often so far.
    """
    values = [list(axis) for axis in axes]
    everything = list(itertools.product(*(range(len(axis)) for axis in values)))
    longest = max(range(len(values)), key=lambda axis: len(values[axis]))
    met: Counter[Any] = Counter()
    chosen: set[tuple[int, ...]] = set()

    def cost(case: tuple[int, ...]) -> tuple[int, int]:
        places = list(enumerate(case))
        return sum(met[pair] for pair in itertools.combinations(places, 2)), sum(met[place] for place in places)

    for value in [*range(len(values[longest]))] * times:
        left = [case for case in everything if case[longest] == value and case not in chosen]
        if left:
            case = min(left, key=cost)
            chosen.add(case)
            met.update([*enumerate(case), *itertools.combinations(enumerate(case), 2)])
    wanted = {place for axis, of in enumerate(values) for place in itertools.product([axis], range(len(of)))}
    if missing := sorted(place for place in wanted if not met[place]):
        raise ValueError(f"Expected a choice with every value. Missing: {missing} (axis, index)")
    return [
        pytest.param(*(values[axis][index] for axis, index in enumerate(case)), marks=_marks(case in chosen))
        for case in everything
    ]


def fast(values: Iterable[Any], *names: Any) -> list[Any]:
    """The values as parameters of a test, those that `names` does not name marked `slow`."""
    listed = list(values)
    if unknown := [name for name in names if name not in listed]:
        raise ValueError(f"Expected some of {listed}. Received: {unknown}")
    return [pytest.param(value, marks=_marks(value in names)) for value in listed]


def _marks(is_fast: bool) -> tuple[Any, ...]:
    return () if is_fast else (pytest.mark.slow,)
