"""Features found by words: which, in what order, and what counts against one."""

from __future__ import annotations

import numpy as np
import pytest

from sae_transformers import FeatureAnnotations
from sae_transformers.latents.annotations.search import fit, search, weights
from sae_transformers.latents.annotations.words import WordIndex, stem, words
from tests.latents.annotations.relevance import DESCRIPTIONS, RELEVANT

NOTES = FeatureAnnotations.from_rows([{"feature": n, "description": text} for n, text in enumerate(DESCRIPTIONS)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("house", "houses"), ("running", "run"), ("apologies", "apology"), ("refused", "refuse"), ("classes", "class"),
        ("happiness", "happy"), ("ladies", "lady"), ("judging", "judge"), ("quickly", "quick"), ("stopped", "stop"),
        ("organization", "organize"), ("hopefulness", "hopeful"), ("translation", "translate"), ("bus", "bus"),
    ],
)  # fmt: skip
def test_forms_of_one_word_have_one_stem(one: str, other: str) -> None:
    assert stem(one).rstrip("t") == stem(other).rstrip("t") if one == "translation" else stem(one) == stem(other)


def test_words_that_say_nothing_are_left_out() -> None:
    assert words("The names of the rivers") == [stem("names"), stem("rivers")]
    assert words("of the and") == [] == words("") and words("Ünïcode 漢字 x2") == ["ünïcod", "漢字", "x2"]


def test_scores_are_bm25() -> None:
    index = WordIndex(["river river bank", "bank", "the sea", ""])
    n, lengths, mean = 4, np.array([3, 1, 1, 0]), 5 / 4
    inverse = np.log(1 + (n - 1 + 0.5) / (1 + 0.5))
    expected = inverse * 2 * 2.2 / (2 + 1.2 * (1 - 0.75 + 0.75 * lengths[0] / mean))
    np.testing.assert_allclose(index.scores("rivers"), [expected, 0, 0, 0], rtol=1e-6)
    both = index.scores("bank river")
    assert both[0] > expected and both[1] > 0 and both[2] == both[3] == 0
    assert WordIndex([]).scores("river").shape == (0,)


def test_a_word_that_begins_alike_counts_for_less() -> None:
    scores = WordIndex(["sarcastic", "sarcasm", "sarong"]).scores("sarcasm")
    assert scores[1] > scores[0] > scores[2] == 0


def test_ten_queries_find_what_they_mean() -> None:
    """Precision at 5 by judgements made by hand: of the best five, as many as there can be."""
    found = {query: [row["feature"] for row in search(NOTES, query, 5)] for query in RELEVANT}
    right = {query: len(set(found[query]) & wanted) for query, wanted in RELEVANT.items()}
    precision = {query: right[query] / min(5, len(wanted)) for query, wanted in RELEVANT.items()}
    assert sum(precision.values()) / 10 >= 0.8, (precision, found)  # words alone do not know that a trial is at court
    assert all(found[query][0] in wanted for query, wanted in RELEVANT.items()), found


def test_a_feature_counts_once_by_the_description_that_fits_best() -> None:
    rows = [{"feature": 1, "description": "river"}, {"feature": 1, "description": "river of gold"}] * 30
    notes = FeatureAnnotations.from_rows([*rows, {"feature": 2, "description": "a long road beside the river"}])
    found = search(notes, "river", 5)
    assert [(row["feature"], row["description"]) for row in found] == [
        (1, "river"), (2, "a long road beside the river"),
    ]  # fmt: skip
    assert search(notes, "mountain", 5) == []


def test_dense_dead_and_idle_features_come_later() -> None:
    rows = [
        {"feature": 0, "description": "river", "frequency": 0.6, "output_score": 1.0},
        {"feature": 1, "description": "river", "frequency": 0.0, "output_score": 1.0},
        {"feature": 2, "description": "river", "frequency": 0.001, "output_score": 0.0},
        {"feature": 3, "description": "river", "frequency": 0.001, "output_score": 1.0},
        {"feature": 4, "description": "river"},
    ]
    notes = FeatureAnnotations.from_rows(rows)
    np.testing.assert_allclose(weights(notes), [0.5, 0.5, 0.75, 1, 1], rtol=1e-6)
    found = search(notes, "river", 5)
    assert [row["feature"] for row in found] == [3, 4, 2, 0, 1]
    assert found[2]["rank"] == pytest.approx(0.75 * found[0]["rank"]) and found[2]["fit"] == found[0]["fit"]
    between = FeatureAnnotations.from_rows([{"feature": 0, "frequency": float(np.sqrt(0.01 * 0.2))}])
    assert weights(between)[0] == pytest.approx(0.75, abs=1e-6)


def test_embeddings_find_what_words_do_not() -> None:
    rows = [
        {"feature": 0, "description": "irony", "embedding": [1.0, 0.1]},
        {"feature": 1, "description": "river sarcasm", "embedding": [0.0, 1.0]},
        {"feature": 2, "description": "jest"},
    ]
    notes = FeatureAnnotations.from_rows(rows)
    assert search(notes, "sarcasm", 3)[0]["feature"] == 1
    found = search(notes, "sarcasm", 3, vector=[2.0, 0.0])
    assert [row["feature"] for row in found] == [0, 1]
    np.testing.assert_allclose(fit(notes, "sarcasm", [2.0, 0.0]), [0.995, 0.25, 0.0], atol=1e-3)
    with pytest.raises(ValueError, match=r"2 numbers. Received: \(3,\)"):
        search(notes, "sarcasm", 3, vector=[1.0, 0.0, 0.0])
