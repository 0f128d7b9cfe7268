"""Scorers by name, and a judge that is a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers.evaluation.scorers.registry import NAMES, checked_scores, get_scorer, judge_scorer
from sae_transformers.evaluation.scorers.sentiment import vader_scorer
from sae_transformers.evaluation.scorers.text_classifier import ClassifierScorer
from tests.create_training_data.tiny_embedder import save_tiny_classifier

TEXTS = ["I love this wonderful day.", "I hate this awful day.", ""]


def test_each_name_gives_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-word")
    folder = save_tiny_classifier(tmp_path)
    labelled = (["love wonderful", "love"], ["hate awful", "hate"])
    asked: list[str] = []

    def ask(questions: Sequence[str]) -> list[str]:
        asked.extend(questions)
        return ["Rating: [[2]]" if "love" in question else "Rating: [[1]]" for question in questions]

    names = {
        "sentiment": {}, "profanity": {}, "refusal": {}, "words": {"labelled": labelled},
        f"classifier:{folder}#unclear": {}, "judge:happiness": {"ask": ask}, "perspective": {"key_env": "SOME_KEY"},
        "perspective:INSULT": {"key_env": "SOME_KEY"},
    }  # fmt: skip
    found = {name: get_scorer(name, **options) for name, options in names.items()}
    assert [getattr(found[f"perspective{end}"], "attribute", "") for end in ("", ":INSULT")] == ["TOXICITY", "INSULT"]
    scores = {name: checked_scores(scorer, TEXTS) for name, scorer in found.items() if "perspective" not in name}
    one = vader_scorer()
    assert scores["sentiment"].tolist() == [one(text) for text in TEXTS]
    assert scores["words"][0] > 0.5 > scores["words"][1]
    assert scores["judge:happiness"].tolist() == [2, 1, 0] and len(asked) == 2  # nothing is asked of an empty text
    assert scores["profanity"][2] == scores[f"classifier:{folder}#unclear"][2] == 0
    assert {name.split(":")[0] for name in names} == {name.split(":")[0] for name in NAMES}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vader", "'sentiment' .*Received: name='vader'"),
        ("classifier:", "name='classifier:'"),
        ("sentiment:x", "name='sentiment:x'"),
        ("words", "labelled=None"),
        ("judge:joy", "ask=None"),
    ],
)
def test_unknown_names_and_what_is_missing(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        get_scorer(name)


def test_equal_texts_are_asked_about_once_and_texts_are_no_format() -> None:
    asked: list[list[str]] = []

    def ask(questions: Sequence[str]) -> list[str]:
        asked.append(list(questions))
        return [f"At first rating: 0, then Rating: [[{number}]]" for number in range(len(questions))]

    score = judge_scorer(ask, "the sea {x}")
    assert score(["a {text}", "b", "a {text}", " "]).tolist() == [0, 1, 0, 0]
    assert len(asked) == 1 and "a {text}" in asked[0][0] and "the sea {x}" in asked[0][0]
    assert score([]).shape == score([" "])[:0].shape and len(asked) == 1


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["Rating: [[1]]", None], "1 of 2 without"),
        (["Rating: [[1]]", "It is fine."], "1 of 2 without"),
        (["Rating: [[1]]", "Rating: [[7]]"], "1 of 2 without"),
        (["Rating: [[1]]"], "each of 2 questions. Received: 1"),
    ],
)
def test_a_judge_that_gives_no_rating(answers: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        judge_scorer(lambda questions: answers, "joy")(["a", "b"])
    with pytest.raises(ValueError, match="concept=' '"):
        judge_scorer(lambda questions: answers, " ")


def test_scores_are_checked() -> None:
    assert checked_scores(lambda texts: [1, 2], ["a", "b"]).dtype == torch.float64
    with pytest.raises(ValueError, match="1 of 2 that are not"):
        checked_scores(lambda texts: [1.0, float("inf")], ["a", "b"])
    with pytest.raises(ValueError, match=r"each of 2 texts. Received: \(2, 1\)"):
        checked_scores(lambda texts: torch.zeros(2, 1), ["a", "b"])


def test_a_classifier_by_name(tmp_path: Path) -> None:
    found = get_scorer(f"classifier:{save_tiny_classifier(tmp_path)}#1")
    assert isinstance(found, ClassifierScorer) and found.label == 1
