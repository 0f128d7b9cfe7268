"""What of a grid is fast."""

from __future__ import annotations

from typing import Any

import pytest

from tests.covering import covering, fast


def fast_ones(parameters: list[Any]) -> list[tuple[Any, ...]]:
    return [one.values for one in parameters if not one.marks]


def test_every_value_is_fast_and_no_case_is_lost() -> None:
    found = covering("abcdef", range(3), [False, True], times=2)
    assert [one.values for one in found] == [(a, b, c) for a in "abcdef" for b in range(3) for c in (False, True)]
    chosen = fast_ones(found)
    assert len(chosen) == 12
    for axis, values in enumerate(("abcdef", range(3), (False, True))):
        assert all(sum(case[axis] == value for case in chosen) >= 2 for value in values)
    assert len({(case[0], case[1]) for case in chosen}) == 12  # no pair twice where there is another
    assert {mark.name for one in found if one.values not in chosen for mark in one.marks} == {"slow"}


def test_more_times_add_cases() -> None:
    once, twice, all_of_it = (fast_ones(covering("abcd", range(3), times=times)) for times in (1, 2, 3))
    assert set(once) < set(twice) < set(all_of_it)
    assert len(all_of_it) == 12


def test_named_ones_are_fast() -> None:
    assert fast_ones(fast(["a", "b", "c"], "b")) == [("b",)]
    with pytest.raises(ValueError, match="Received: \\['d'\\]"):
        fast(["a"], "d")
