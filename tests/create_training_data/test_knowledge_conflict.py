"""Questions with two contexts: files, pools, demonstrations, prompts."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from sae_transformers.create_training_data.knowledge_conflict import (
    ConflictQuestion,
    conflict_prompt,
    demonstrations,
    question_groups,
    read_conflicts,
    split_pool,
)


def question(number: int, of: int | None = None) -> ConflictQuestion:
    asked = number if of is None else of
    return ConflictQuestion(f"q{asked}?", f"old {number}", (f"o{number}", "other"), f"new {number}", (f"s{number}",))


QUESTIONS = [question(i) for i in range(20)] + [question(20, of=3), question(21, of=3)]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_read(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    rows = [{name: list(v) if isinstance(v, tuple) else v for name, v in one._asdict().items()} for one in QUESTIONS]
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        frame = pd.DataFrame(rows)
        frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, index=False)
    assert read_conflicts(str(path)) == QUESTIONS


def test_a_single_answer_and_what_is_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {**question(1)._asdict(), "org_answer": "[sic]", "sub_answer": "one"}
    path.write_text(json.dumps(row))
    assert read_conflicts(str(path))[0].org_answer == ("[sic]",)
    assert read_conflicts(str(path))[0].sub_answer == ("one",)
    for broken, name in (({"sub_answer": []}, "sub_answer"), ({"org_context": ""}, "org_context")):
        path.write_text(json.dumps({**row, **broken}))
        with pytest.raises(ValueError, match=f"no {name} in row 1"):
            read_conflicts(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="no questions"):
        read_conflicts(str(path))


def test_groups_stay_together():
    groups = question_groups(QUESTIONS)
    assert len(groups) == 20
    assert groups[3] == [3, 20, 21]
    pool, rest = split_pool(QUESTIONS, n_groups=8, seed=1)
    assert sorted([*pool, *rest]) == list(range(22))
    assert not {QUESTIONS[i].question for i in pool} & {QUESTIONS[i].question for i in rest}
    assert split_pool(QUESTIONS, n_groups=8, seed=1)[0] == pool != split_pool(QUESTIONS, n_groups=8, seed=2)[0]
    remembered, _ = split_pool(QUESTIONS, n_groups=2, seed=1, among=[21, 5])
    assert sorted(remembered) == [3, 5, 20, 21]


def test_demonstrations_are_of_other_questions():
    for seed in range(20):
        found = demonstrations(QUESTIONS, range(22), 5, seed=seed, avoid=20)
        assert len({QUESTIONS[i].question for i in found}) == 5
        assert not {3, 20, 21} & set(found)
    assert demonstrations(QUESTIONS, range(22), 5, seed=1) == demonstrations(QUESTIONS, range(22), 5, seed=1)


def test_prompts_by_hand():
    shown = [question(1), question(2)]
    assert conflict_prompt(question(9), shown) == (
        "context: old 1\nquestion: q1?\nanswer: o1\n\n"
        "context: old 2\nquestion: q2?\nanswer: o2\n\n"
        "context: new 9\nquestion: q9?\nanswer:"
    )
    assert conflict_prompt(question(9), shown[:1], "sub_org") == (
        "context: new 1\nquestion: q1?\nanswer: o1\n\ncontext: new 9\nquestion: q9?\nanswer:"
    )
    assert conflict_prompt(question(9), shown[:1], "sub_sub").startswith(
        "context: new 1\nquestion: q1?\nanswer: s1\n\n"
    )
    assert conflict_prompt(question(9), shown[:1], context=None) == (
        "question: q1?\nanswer: o1\n\nquestion: q9?\nanswer:"
    )
    assert conflict_prompt(question(9), instruction="Think.") == "Think.\n\ncontext: new 9\nquestion: q9?\nanswer:"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_pool(QUESTIONS, n_groups=20, seed=0), "n_groups=20"),
        (lambda: split_pool(QUESTIONS, n_groups=2, seed=0, among=[4]), "at most 1"),
        (lambda: demonstrations(QUESTIONS, [3, 20, 21], 2, seed=0), "shots=2"),
        (lambda: conflict_prompt(question(1), style="doo"), "style='doo'"),
        (lambda: conflict_prompt(question(1), context="both"), "context='both'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
