"""Questions with two contexts: files, pools, demonstrations, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from datasets import Dataset

from sae_transformers.create_training_data.knowledge_conflict import (
    ConflictQuestion,
    conflict_prompt,
    demonstrations,
    question_groups,
    read_conflicts,
    read_macnoise,
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


def macnoise_rows(part: str, count: int) -> list[dict[str, object]]:
    return [
        {
            "question": f"{part} {i}?", "org_context": f"org {i}", "org_answer": [f"o{i}"],
            "sub_context": f"sub {part} {i}", "sub_answer": [f"s{i}"],
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["folder", "macnoise", "GWHed/dataset_macnoise"])
def test_macnoise_in_spares_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """The first rows of the part that a language model wrote, then all of the other, as item numbers count them."""
    parts = {"train_chatgpt": macnoise_rows("train_chatgpt", 5), "train": macnoise_rows("train", 4)}
    if source == "folder":
        for part, rows in parts.items():
            (tmp_path / "data").mkdir(exist_ok=True)
            Dataset.from_list(rows[:3]).to_parquet(tmp_path / f"data/{part}-00000-of-00002.parquet")
            Dataset.from_list(rows[3:]).to_parquet(tmp_path / f"data/{part}-00001-of-00002.parquet")
        source = str(tmp_path)
    else:

        def hub(name: str, subset: None, *, split: str, **options: object) -> Dataset:
            assert (name, subset) == ("GWHed/dataset_macnoise", None)
            return Dataset.from_list(parts[split])

        monkeypatch.setattr(datasets, "load_dataset", hub)
    questions = read_conflicts(source)
    assert [one.question for one in questions] == [
        *(f"train_chatgpt {i}?" for i in range(5)), *(f"train {i}?" for i in range(4)),
    ]  # fmt: skip
    assert questions[5] == ConflictQuestion("train 0?", "org 0", ("o0",), "sub train 0", ("s0",))
    if source == str(tmp_path):
        few = read_macnoise(source, {"train_chatgpt": 4, "train": None})
        assert [one.question for one in few[3:5]] == ["train_chatgpt 3?", "train 0?"]
        with pytest.raises(FileNotFoundError, match="begin with 'dev'"):
            read_macnoise(source, {"dev": None})
