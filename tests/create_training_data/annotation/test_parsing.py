"""Labels, summaries and masks from a model's words."""

import json

import pytest

from sae_transformers.create_training_data.annotation.parsing import (
    clean_label,
    decision_format,
    join_judgements,
    parse_decision,
    parse_explanation,
    read_judgement,
    task_labels,
    unintended_features,
    unintended_mask,
    without_thoughts,
)
from sae_transformers.create_training_data.annotation.tables import AnnotationRow


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("It fits. Final Decision: [[ Yes ]]", "yes"),
        ("Final Decision: [[Yes]]", "yes"),
        ("Final Decision: Probably.", "probably"),
        ("Final Decision: Probably. I am sure.", "probably"),
        ("Final Decision: [ Yes ]", "[ yes ]"),
        ("I do not know", "i do not know"),
        ("Probably.", "probably."),
        ("Final Decision: [[No]] because [[x]]", "no]] because [[x"),
        ("A decision: [[Yes]]. Another decision: [[ Maybe ]]", "maybe"),
        ("**Final Decision:** [[ Probably ]]", "probably"),
        ("Final Decision: ``[[ No ]]``", "no"),
        ("[[ Yes ]]", "yes"),
        ("FINAL DECISION: YES", "yes"),
        ("final decision [[ : maybe. so ]]", "maybe"),
        ("", ""),
    ],
)
def test_decisions_are_read_as_the_original_reads_them(text: str, decision: str) -> None:
    assert parse_decision(text) == decision


@pytest.mark.parametrize(
    ("label", "clean"),
    [("[ Yes ]", "yes"), ("[[no]]", "no"), (" Probably ", "probably"), ("no]] because", "no because")],
)
def test_brackets_are_no_part_of_a_label(label: str, clean: str) -> None:
    assert clean_label(label) == clean


@pytest.mark.parametrize(
    ("texts", "summary"),
    [
        ("Names of rivers. Mostly in Asia.", "Names of rivers."),
        ("Names of rivers", "Names of rivers."),
        (["Rivers. x", "I cannot tell.", "Lakes."], "Rivers or Lakes."),
        ("Cannot Tell.", "Cannot Tell."),
        ("I really CANNOT TELL what", "Cannot Tell."),
        ("", "Cannot Tell."),
        ([], "Cannot Tell."),
        (" . ", "Cannot Tell."),
    ],
)
def test_explanations_are_cut_to_their_first_sentence(texts: str | list[str], summary: str) -> None:
    assert parse_explanation(texts) == summary


@pytest.mark.parametrize(
    ("text", "label", "full"),
    [
        ('{"reason": "All name rivers.", "decision": "Yes"}', "yes", "All name rivers. Final Decision: [[ yes ]]"),
        ('```json\n{"reason": "r", "decision": "no"}\n```', "no", "r Final Decision: [[ no ]]"),
        ('{"decision": "maybe", "reason": "cut o', "maybe", None),
        ('{"reason": "decision: hard", "decision": "probably"', "probably", None),
        ('{"reason": "cut off', '{"reason": "cut off', None),
        ("Fine. Final Decision: [[ Probably ]]", "probably", None),
        ("Final Decision: [ Yes ]", "yes", None),
        ("<think>decision: [[ no ]]</think>\nFinal Decision: [[ yes ]]", "yes", "Final Decision: [[ yes ]]"),
        ("[1, 2]", "1, 2", None),
    ],
)
def test_judgements_are_json_or_text(text: str, label: str, full: str | None) -> None:
    assert read_judgement(text) == (label, text if full is None else full)


def test_a_full_answer_of_json_reads_as_the_original_reads_it() -> None:
    label, full = read_judgement('{"reason": "A decision: hard.", "decision": "probably"}')
    assert parse_decision(full) == label == "probably"


def test_thoughts_that_never_end_leave_nothing() -> None:
    assert without_thoughts("<think>a</think> b <think>c") == "b"
    assert without_thoughts("<think>a") == ""


def test_the_schema_is_strict_and_reasons_come_first() -> None:
    schema = decision_format(["yes", "no"])["json_schema"]["schema"]
    assert schema["required"] == ["reason", "decision"] == list(schema["properties"])
    assert schema["properties"]["decision"]["enum"] == ["yes", "no"]
    json.dumps(schema)


def test_judgements_are_joined_and_taken_apart() -> None:
    task = join_judgements([("yes", "a ||| b"), ("no", "c")])
    assert task == "yes|||a | b|||no|||c"
    assert task_labels(task) == ["yes", "no"]
    assert task_labels("[ Yes ]|||why") == ["yes"]


def row(number: int, task: str, summary: str = "Rivers.", words: str = "Span 1: a") -> AnnotationRow:
    return AnnotationRow(number, words, summary, "yes", task)


@pytest.mark.parametrize(
    ("task", "unintended"),
    [
        ("yes|||a", False),
        ("Probably|||a", False),
        ("[ YES ]|||a", False),
        ("maybe|||a", True),
        ("no|||a", True),
        ("no]] because [[x|||a", True),
        ("i do not know|||a", True),
        ("yes, certainly|||a", True),
        ("-", False),
        ("", False),
    ],
)
def test_what_is_not_yes_or_probably_is_unintended(task: str, unintended: bool) -> None:
    assert unintended_mask([row(0, task)]) == [unintended]


@pytest.mark.parametrize(
    ("summary", "words", "unintended"),
    [
        ("Cannot Tell.", "Span 1: a", False),
        ("I CANNOT TELL", "Span 1: a", False),
        ("Rivers.", "", False),
        ("Rivers.", "nothing", False),
        ("Rivers.", "SPAN 1: a", True),
    ],
)
def test_features_of_which_nothing_is_known_are_never_unintended(summary: str, words: str, unintended: bool) -> None:
    assert unintended_mask([row(0, "no|||a", summary, words)]) == [unintended]


def test_two_judgements_are_chosen_by_number_or_must_agree() -> None:
    tasks = ["yes|||a|||no|||b", "no|||a|||yes|||b", "no|||a|||maybe|||b", "yes|||a|||probably|||b", "-"]
    rows = [row(10 + number, task) for number, task in enumerate(tasks)]
    assert unintended_features(rows) == [11, 12]
    assert unintended_features(rows, (1,)) == [10, 12]
    assert unintended_features(rows, (0, 1)) == [12]
    assert unintended_features(rows, intended=("yes", "maybe", "probably", "no")) == []


def test_a_judgement_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match=r"Feature 3 has 1 judgement.*judgements=\(1,\)"):
        unintended_mask([row(3, "yes|||a")], (1,))
    with pytest.raises(ValueError, match=r"judgements=\(\)"):
        unintended_mask([], ())
