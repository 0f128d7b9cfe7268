"""Exact match with either answer."""

from __future__ import annotations

import math

import pytest

from sae_transformers.evaluation.knowledge import (
    Behaviours,
    answer_behaviours,
    exact_match,
    in_context,
    knowledge_metrics,
    normalized_answer,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("an A-Team, a.k.a. theirs", "ateam aka theirs"),
        ("Beyonc\u00e9", "beyonce\u0301"),
        ("a the an", ""),
    ],
)
def test_normalized(text, expected):
    assert normalized_answer(text) == expected


def test_matches():
    assert exact_match("the Beatles.", ["Rolling Stones", "Beatles"])
    assert not exact_match("Beatle", ["Beatles"])
    assert in_context("BEATLES", "Then the Beatles came.")
    assert not in_context("", "Then the Beatles came.")


def test_behaviours():
    answers = ["Paris", "Rome.", "Oslo"]
    told = answer_behaviours(answers, [["Rome"]] * 3, [["Paris", "Oslo"]] * 3)
    assert told == Behaviours([False, True, False], [True, False, True])
    told = answer_behaviours(answers, [["Rome"]] * 3, [["Paris"]] * 3, ["in Oslo, Paris and Rome"] * 3)
    assert told == Behaviours([True, True, True], [True, False, False])
    with pytest.raises(ValueError, match=r"lengths \[3, 2, 3\]"):
        answer_behaviours(answers, [["Rome"]] * 2, [["Paris"]] * 3)


def test_metrics():
    before = Behaviours([True, True, False, False], [False, False, True, False])
    after = Behaviours([True, False, False, False], [False, True, False, True])
    found = knowledge_metrics(after, before)
    assert found == {
        "em_context": 0.25,
        "em_memory": 0.5,
        "neither": 0.25,
        "em_context_to_context": 0.5,
        "em_context_to_memory": 0.5,
        "em_memory_to_context": 0.0,
        "em_memory_to_memory": 0.0,
    }
    nobody = knowledge_metrics(after, Behaviours([False] * 4, [True] * 4))
    assert math.isnan(nobody["em_context_to_memory"])
    assert knowledge_metrics(after) == {"em_context": 0.25, "em_memory": 0.5, "neither": 0.25}
    with pytest.raises(ValueError, match="4 and 1"):
        knowledge_metrics(after, Behaviours([True], [True]))
