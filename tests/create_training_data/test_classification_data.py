"""Texts and labels of a task, as files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.create_training_data.classification_data import read_classification


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_words_are_labels_and_two_make_a_decision(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "spam"}, {"text": "b", "label": "ham"}, {"text": "c", "label": "spam"}]
    data = read_classification(
        {"train": write(tmp_path / "a.jsonl", rows), "test": write(tmp_path / "b.jsonl", rows[:1])}
    )
    assert data.names == ["ham", "spam"] and data.objective == "binary"
    train, test = data.labels["train"], data.labels["test"]
    assert train is not None and train.tolist() == [1, 0, 1] and test is not None and test.tolist() == [1]
    assert data.texts == {"train": ["a", "b", "c"], "test": ["a"]}
    assert data.base_options()["id2label"] == {0: "spam"}
    assert data.describe() == "train: 3 texts, ham 1, spam 2\ntest: 1 texts, ham 0, spam 1"


def test_classes_and_the_rest(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in "zyxzx"]
    data = read_classification({"train": write(tmp_path / "a.jsonl", rows)}, classes=["y", "x"])
    assert data.names == ["y", "x", "other"] and data.objective == "multi_class"
    train = data.labels["train"]
    assert train is not None and train.tolist() == [2, 0, 1, 2, 1]
    with pytest.raises(ValueError, match="none of .'w'."):
        read_classification({"train": str(tmp_path / "a.jsonl")}, classes=["w"])


def test_numbers_are_labels_however_they_are_written(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (1, 0.0, "1", True, "0")]
    data = read_classification({"train": write(tmp_path / "a.jsonl", rows)})
    train = data.labels["train"]
    assert data.names == ["0", "1"] and train is not None and train.tolist() == [1, 0, 1, 1, 0]


def test_several_columns_are_labels_that_hold_together(tmp_path: Path) -> None:
    rows = [{"text": "a", "rude": 1, "long": "false"}, {"text": "b", "rude": 0, "long": "1"}]
    data = read_classification({"train": write(tmp_path / "a.jsonl", rows)}, label_column="rude,long")
    train = data.labels["train"]
    assert data.objective == "multi_label" and train is not None and train.tolist() == [[1, 0], [0, 1]]


def test_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": "", "chosen": "x", "rejected": "y"}]
    options: dict[str, Any] = {"pairs": ("chosen", "rejected"), "prompt_column": "prompt"}
    data = read_classification({"train": write(tmp_path / "a.jsonl", rows)}, **options)
    assert data.texts["train"] == ["p\n\ngood", "p\n\nbad", "x", "y"]
    assert data.pairs and data.labels == {"train": None} and data.describe() == "train: 2 pairs"


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ([{"text": "a", "label": 1}], [], {}, "Two labels or more"),
        ([{"text": "a"}], [], {}, "row 1 has none"),
        ([{"label": 1}], [], {}, "column 'text'"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], [{"text": "c", "label": 2}], {}, r"\['2'\] in"),
        ([{"text": "a", "x": 3, "y": 0}], [], {"label_column": "x,y"}, "'x' must be 0 or 1"),
        ([{"text": "a"}], [], {"pairs": ("a", "b")}, "column 'a'"),
    ],
)
def test_bad_rows_are_told(tmp_path: Path, train: list, test: list, options: dict, message: str) -> None:
    sources = {"train": write(tmp_path / "a.jsonl", train)}
    if test:
        sources["test"] = write(tmp_path / "b.jsonl", test)
    with pytest.raises(ValueError, match=message):
        read_classification(sources, **options)
