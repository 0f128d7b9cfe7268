"""One question about many features, answered by a server on this machine or a tiny model here."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.create_training_data.annotation.questions import (
    FeatureAnswer,
    annotation_rows,
    ask_about_features,
    parse_answers,
    question_requests,
    write_answers,
)
from sae_transformers.create_training_data.annotation.steps import explain
from sae_transformers.create_training_data.annotation.tables import AnnotationRow
from sae_transformers.create_training_data.llm.client import LLMClient
from sae_transformers.create_training_data.llm.local import LocalChat
from tests.create_training_data.fake_openai import FakeOpenAI, last_user_text
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base

QUESTION = "Does the feature concern gender?"
LABELS = ("yes", "maybe", "no")
ROWS = annotation_rows(
    [[" she", " her"], [" car", "Wheel"], [" he"], [" 40", "50"], [" queen"]], [["her\nown"], [], [], [], [""]]
)


def rule(number: int) -> str:
    return "yes" if number in (0, 2, 4) else "no"


def obedient(body: dict[str, Any]) -> str:
    numbers = [int(n) for n in re.findall(r"^Feature (\d+)", last_user_text(body), flags=re.MULTILINE)]
    if "Final Decision" in last_user_text(body):
        return json.dumps({"reason": "because", "decision": rule(numbers[0])})
    entries = [{"feature": n, "reason": "because", "answer": rule(n)} for n in numbers]
    return json.dumps({"answers": entries})


def asked(server: FakeOpenAI, tmp_path: Path | None = None, **options: Any) -> list[FeatureAnswer]:
    with LLMClient("m", server.url, cache=tmp_path, backoff=(0.001, 0.002)) as client:
        return ask_about_features(QUESTION, ROWS, client, progress=False, **options)


def test_rows_of_a_table() -> None:
    assert ROWS[0].spans() == ["Tokens it makes likelier: ' she', ' her'", "her own"]
    assert [row.feature_id for row in ROWS] == [0, 1, 2, 3, 4] and len(ROWS[4].spans()) == 1


@pytest.mark.parametrize(("at_once", "requests"), [(20, 1), (2, 3), (1, 5)])
def test_every_feature_gets_an_answer(at_once: int, requests: int) -> None:
    with FakeOpenAI(obedient) as server:
        found = asked(server, at_once=at_once)
    assert len(server.sent) == requests
    assert [(one.feature, one.answer, one.failure) for one in found] == [(i, rule(i), "") for i in range(5)]
    assert all(QUESTION in last_user_text(body) and body["response_format"] for body in server.sent)
    assert "because" in found[0].reason


def test_what_an_answer_leaves_out_is_asked_alone_and_the_cache_answers_again(tmp_path: Path) -> None:
    def forgetful(body: dict[str, Any]) -> str:
        answer = json.loads(obedient(body))
        if "answers" in answer:
            answer["answers"] = [one for one in answer["answers"] if one["feature"] != 3] + [
                {"feature": 99, "answer": "yes"}
            ]
            answer["answers"][0]["answer"] = "perhaps"
        return json.dumps(answer)

    with FakeOpenAI(forgetful) as server:
        found = asked(server, tmp_path, at_once=5)
        assert [one.answer for one in found] == [rule(i) for i in range(5)] and len(server.sent) == 3
        assert asked(server, tmp_path, at_once=5) == found and len(server.sent) == 3


def test_no_answer_is_told() -> None:
    with FakeOpenAI(lambda body: "I would rather not.") as server:
        found = asked(server)
    assert {one.failure for one in found} == {"no answer in the form"} and {one.answer for one in found} == {""}
    with FakeOpenAI(obedient) as server:
        server.always = "400"
        found = asked(server)
    assert all(one.failure.startswith("rejected") for one in found)
    with FakeOpenAI(obedient) as server, LLMClient("m", server.url) as client:
        found = ask_about_features(QUESTION, [AnnotationRow(7, "")], client, progress=False)
    assert found == [FeatureAnswer(7, "", failure="no spans")] and not server.sent


def test_a_budget_holds() -> None:
    with FakeOpenAI(obedient) as server, LLMClient("m", server.url, max_tokens_total=10) as client:
        found = ask_about_features(QUESTION, ROWS, client, progress=False)
    assert not server.sent and all("budget" in one.failure for one in found)


def test_summaries_are_shown_and_explain_takes_the_rows() -> None:
    with FakeOpenAI(lambda body: "Words about women.") as server, LLMClient("m", server.url) as client:
        rows = explain(ROWS, client, progress=False)
    assert rows[0].summary == "Words about women."
    text = question_requests(QUESTION, rows)[0].messages[-1]["content"]
    assert "Feature 0: Words about women.\n- Tokens it makes likelier: ' she', ' her'\n- her own" in text


def test_a_local_model_is_held_to_the_labels() -> None:
    tokenizer = word_tokenizer()
    chat = LocalChat("tiny", loaded=(tiny_base(max_position_embeddings=2048), tokenizer))
    found = ask_about_features(QUESTION, ROWS[:2], chat, at_once=1, progress=False)
    assert all(one.answer in LABELS and not one.failure for one in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"answers": [{"feature": 1, "answer": "Yes"}, {"feature": "2", "answer": "no"}]}', {1: "yes", 2: "no"}),
        ('```json\n{"answers": [{"feature": 1, "answer": "no"}, {"feature": 2, "ans', {1: "no"}),
        ('<think>{"feature": 1, "answer": "no"}</think>Feature 1: yes, so\n2 - maybe', {1: "yes", 2: "maybe"}),
        ("1. nothing to say\n2. No.", {2: "no"}),
        ('{"feature": 1, "answer": "yes"} {"feature": 1, "answer": "no"} {"feature": 5, "answer": "no"}', {1: "yes"}),
        ('{"feature": true, "answer": "yes"} {"feature": 2, "answer": null} {"feature": 1.0, "answer": "no"}', {}),
    ],
)  # fmt: skip
def test_answers_are_read(text: str, expected: dict[int, str]) -> None:
    assert {one.feature: one.answer for one in parse_answers(text, [1, 2, 3], LABELS)} == expected


def test_bad_questions() -> None:
    for question, labels, at_once, told in (
        (" ", LABELS, 1, "question=' '"),
        (QUESTION, ("yes",), 1, r"\['yes'\]"),
        (QUESTION, ("yes", "Yes"), 1, "all different"),
        (QUESTION, LABELS, 0, "at_once=0"),
    ):
        with pytest.raises(ValueError, match=told):
            question_requests(question, ROWS, labels, at_once=at_once)


def test_answers_are_written(tmp_path: Path) -> None:
    path = write_answers(
        [FeatureAnswer(3, "yes", 'a, "b"'), FeatureAnswer(4, "", failure="none")], tmp_path / "x" / "a.csv"
    )
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["feature", "answer", "reason", "failure"], ["3", "yes", 'a, "b"', ""], ["4", "", "", "none"]
        ]  # fmt: skip
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["a.csv"]
