"""Prompts in SpARE's columns: written, read again, and refused where they are of other questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.create_training_data.grouped_prompts import GroupedPrompt, grouped_rows, read_grouped_prompts
from sae_transformers.create_training_data.knowledge_conflict import ConflictQuestion

QUESTIONS = [ConflictQuestion(f"q{i}?", f"org {i}", (f"o{i}",), f"sub {i}", (f"s{i}", f"t{i}")) for i in range(4)]
GROUPED = [
    GroupedPrompt(2, (0, 3), "sub_sub", "s2", True, False, 1.5, 2.5),
    GroupedPrompt(1, (0, 3), "sub_sub", "", False, False),
    GroupedPrompt(1, (3, 0), "org_org", "o1", False, True),
    GroupedPrompt(2, (0, 3), "sub_org", "x", False, False),
]


def test_columns_and_order_are_spares() -> None:
    rows = grouped_rows(GROUPED, QUESTIONS)
    assert [(row["item_idx"], row["prompt_type"]) for row in rows] == [
        (2, "dss_s"), (2, "dso_s"), (1, "dss_s"), (1, "doo_s"),
    ]  # fmt: skip
    assert rows[0] == {
        "sub_answer": ["s2", "t2"], "org_answer": ["o2"], "pred_answer": "s2", "sub_answer_em": 1, "org_answer_em": 0,
        "item_idx": 2, "demonstration_ids": [0, 3], "prompt_type": "dss_s", "ss_loss": 1.5, "so_loss": 2.5,
    }  # fmt: skip


def test_written_and_read(tmp_path: Path) -> None:
    for name, part in (("b.json", GROUPED[2:]), ("a.json", GROUPED[:2])):
        (tmp_path / name).write_text(json.dumps(grouped_rows(part, QUESTIONS)))
    assert set(read_grouped_prompts(tmp_path, QUESTIONS)) == set(GROUPED)
    assert read_grouped_prompts(tmp_path / "a.json", QUESTIONS) == GROUPED[:2]
    expected = "context: sub 0\nquestion: q0?\nanswer: o0\n\ncontext: sub 3\nquestion: q3?\nanswer: o3\n\n"
    assert GROUPED[3].prompt(QUESTIONS) == f"{expected}context: sub 2\nquestion: q2?\nanswer:"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_type": "doo"}, "prompt_type` is one of dss_s, dso_s, doo_s. Received: 'doo' in row 1"),
        ({"item_idx": 7}, r"rows of 4 questions .* Received: \[7, 0, 3\] in row 1"),
        ({"sub_answer": ["other"]}, r"of question 2. Received: \['other'\] and \['o2'\] in row 1"),
        ({"pred_answer": None, "org_answer_em": ...}, "no org_answer_em in row 1"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {**grouped_rows(GROUPED, QUESTIONS)[0], **change}
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{name: value for name, value in row.items() if value is not ...}]))
    with pytest.raises(ValueError, match=message):
        read_grouped_prompts(file, QUESTIONS)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match=r"Expected a .json of grouped prompts or a folder"):
            read_grouped_prompts(path, QUESTIONS)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="Expected JSON"):
        read_grouped_prompts(tmp_path, QUESTIONS)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="list of grouped prompts .* Received: dict"):
        read_grouped_prompts(tmp_path, QUESTIONS)
