"""Concept sets by a chat model: what is asked, what becomes of the answers, and nothing asked twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.create_training_data.concept_recipe import ConceptRecipe
from sae_transformers.create_training_data.concept_sets import HARD, NEGATIVE, POSITIVE
from sae_transformers.create_training_data.concept_writing import (
    ask_instructions,
    expected_requests,
    instructions_wanted,
    make_concept_sets,
    parse_meanings,
    parse_rating,
    rate_answers,
)
from sae_transformers.create_training_data.llm.client import LLMClient
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text

CONCEPTS = ["the sea", "loops in code"]
RECIPE = ConceptRecipe(positives=3, negatives=4, test=2, hard_negatives=2, steering=1, words=20, max_answer_tokens=30)
ASKED = [f"tell me of subject {i}" for i in range(9)]


def answer(body: dict[str, Any]) -> str:
    text = last_user_text(body)
    if "other meaning" in text:
        return "1. wave: to greet with a hand\nbank - no colon\n- current: of now"
    if "short instructions" in text:
        number = re.findall(r"Variant (\d+)", text)[0]
        return "\n".join(f"{i}. Write a line {i} of {number}" for i in range(20)) + "\nToo short"
    if "Rating" in text:
        return "I think so. Rating: [[2]]" if "ship" in text else "Rating: 1"
    kind = (
        "near"
        if "in this meaning" in text
        else "without"
        if "Nothing in" in text
        else "with"
        if "Let this" in text
        else "plain"
    )
    return f"<think>hm</think> {kind}: {re.findall(r'subject [0-9]+', text)[0]}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeOpenAI(answer) as fake:
        yield fake


def client(server: FakeOpenAI, **settings: Any) -> LLMClient:
    return LLMClient("m", server.url, **{"backoff": (0.01, 0.05), "timeout": 10, "max_attempts": 2, **settings})


def test_sets_have_what_the_recipe_says(server: FakeOpenAI) -> None:
    with client(server) as asking:
        made = make_concept_sets(CONCEPTS, ASKED, asking, RECIPE, progress=False)
    assert not made.failures
    one, other = made.sets
    assert [s.concept for s in made.sets] == CONCEPTS and one.train[NEGATIVE] == other.train[NEGATIVE]
    assert {k: len(v) for k, v in one.train.items()} == {NEGATIVE: 4, POSITIVE: 3}
    assert {k: len(v) for k, v in one.test.items()} == {POSITIVE: 2, NEGATIVE: 2, HARD: 2}
    kinds = {(part, category): {e.text.split(":")[0] for e in found} for part in ("train", "test")
             for category, found in getattr(one, part).items()}  # fmt: skip
    assert kinds == {
        ("train", POSITIVE): {"with"}, ("train", NEGATIVE): {"plain"}, ("test", POSITIVE): {"with"},
        ("test", NEGATIVE): {"without"}, ("test", HARD): {"near"},
    }  # fmt: skip
    of = {part: {e.instruction for found in getattr(one, part).values() for e in found} for part in ("train", "test")}
    of["steering"] = set(one.steering_instructions)
    assert [len(of[part]) for part in ("train", "test", "steering")] == [4, 2, 1]
    assert not of["train"] & of["test"] and not of["steering"] & (of["train"] | of["test"])
    hard = [last_user_text(body) for body in server.sent if "in this meaning" in last_user_text(body)]
    assert sum('"wave" in this meaning: to greet with a hand' in text for text in hard) == 2
    # two lists of meanings; 4 plain; of each concept 3 + 2 with, 2 without, 2 near
    assert len(server.sent) == 2 + 4 + 2 * (3 + 2 + 2 + 2)
    assert {body["temperature"] for body in server.sent} == {1.0} and {body["max_tokens"] for body in server.sent} == {
        30
    }


def test_nothing_is_asked_twice_and_a_stopped_run_goes_on(server: FakeOpenAI, tmp_path: Path) -> None:
    with client(server, cache=tmp_path, max_tokens_total=900, concurrency=1) as asking:
        first = make_concept_sets(CONCEPTS, ASKED, asking, RECIPE, progress=False)
    assert set(first.failures) == {"not done"} and first.failures["not done"] > 0
    with client(server, cache=tmp_path) as asking:
        second = make_concept_sets(CONCEPTS, ASKED, asking, RECIPE, progress=False)
        again = make_concept_sets(CONCEPTS, ASKED, asking, RECIPE, progress=False)
    assert not second.failures and again == second
    counts = Counter(last_user_text(body) for body in server.sent)
    assert set(counts.values()) == {1}
    plain = make_fresh(server)
    assert plain.sets == second.sets


def make_fresh(server: FakeOpenAI) -> Any:
    with client(server) as asking:
        return make_concept_sets(CONCEPTS, ASKED, asking, RECIPE, progress=False)


def test_the_estimate_sends_nothing(server: FakeOpenAI, tmp_path: Path) -> None:
    with client(server, cache=tmp_path, prices=(1.0, 2.0)) as asking:
        before = asking.estimate(expected_requests(CONCEPTS, ASKED, asking, RECIPE))
        assert not server.sent and before.requests == 24
        make_concept_sets(CONCEPTS, ASKED, asking, RECIPE, progress=False)
        after = asking.estimate(expected_requests(CONCEPTS, ASKED, asking, RECIPE))
    assert len(server.sent) == 24 and after.answered == 24 and after.cost == 0


def test_answers_that_fail_are_left_out_and_counted(server: FakeOpenAI) -> None:
    server.next("refusal", "refusal")
    recipe = ConceptRecipe(positives=3, negatives=3, test=0, hard_negatives=0, steering=0, words=20)
    with client(server, concurrency=1) as asking:
        made = make_concept_sets(["the sea"], ASKED, asking, recipe, progress=False)
    assert made.failures == {"refusal": 2}
    assert sum(len(part) for part in made.sets[0].train.values()) == 4 and not made.sets[0].test


def test_meanings_that_were_not_given_are_counted(server: FakeOpenAI) -> None:
    """Found as hard negatives that were missing without a word."""
    server.next("400")
    with client(server, concurrency=1) as asking:
        made = make_concept_sets(["the sea"], ASKED, asking, RECIPE, progress=False)
    assert made.failures == {"rejected": 1} and HARD not in made.sets[0].test


def test_instructions_are_made_up(server: FakeOpenAI) -> None:
    with client(server) as asking:
        found = ask_instructions(asking, 35, RECIPE, progress=False)
    assert len(found) == len(set(found)) == 35 and found[0] == "Write a line 0 of 1" and "Too short" not in found


def test_ratings(server: FakeOpenAI) -> None:
    with client(server) as asking:
        found = rate_answers(asking, "the sea", ["a", "b"], ["a ship", "a road"])
        assert found == {"concept": [2, 1], "instruction": [2, 1], "fluency": [2, 1]}
        assert rate_answers(asking, "the sea", ["", ""], ["a ship", "a road"], kinds=["fluency"]) == {
            "fluency": [2, 1]
        }
        with pytest.raises(ValueError, match="'style'"):
            rate_answers(asking, "x", ["a"], ["b"], kinds=["style"])
        server.next("400")
        with pytest.raises(ValueError, match="1 of 1 requests without an answer, the first because: rejected"):
            rate_answers(asking, "loops", ["a"], ["b"], kinds=["concept"])
        with pytest.raises(ValueError, match="1 and 2 texts"):
            rate_answers(asking, "x", ["a"], ["b", "c"])


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[2]]", 2.0),
        ("**Rating: 1**", 1.0),
        ("Rating: [[0]] no, Rating: [[1.5]]", 1.5),
        ("rating - 2", 2.0),
        ("Rating: [[7]]", 0.0),
        ("It is good.", 0.0),
        ("<think>Rating: 2</think>Rating: [[1]]", 1.0),
    ],
)
def test_parse_rating(text: str, rating: float) -> None:
    assert parse_rating(text) == rating


def test_parse_meanings() -> None:
    text = "1. **wave**: to greet\nno meaning:\n- bank : of a river\na very long word indeed: x\n: y"
    assert parse_meanings(text) == [("wave", "to greet"), ("bank", "of a river")]


@pytest.mark.parametrize(
    ("concepts", "instructions", "told"),
    [
        ([], ASKED, "Received: \\[\\]"),
        (["a", "a"], ASKED, "each once"),
        (["a", " "], ASKED, "none empty"),
        (["a"], [*ASKED[:5], *ASKED[:5]], "needs 7 different instructions. Received: 5"),
    ],
)
def test_what_is_refused(server: FakeOpenAI, concepts: Any, instructions: Any, told: str) -> None:
    assert instructions_wanted(RECIPE) == 7
    with client(server) as asking, pytest.raises(ValueError, match=told):
        make_concept_sets(concepts, instructions, asking, RECIPE, progress=False)
    assert not server.sent


@pytest.mark.parametrize("change", [{"positives": 0}, {"words": 0}, {"test": -1}])
def test_recipes_that_make_no_sense(change: dict) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ConceptRecipe(**change)
