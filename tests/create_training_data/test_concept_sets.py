"""Concept sets on disk: AxBench's layout and plain tables, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sae_transformers.create_training_data.concept_sets import (
    COLUMNS,
    HARD,
    NEGATIVE,
    POSITIVE,
    ConceptSet,
    Example,
    read_concept_sets,
    write_concept_sets,
)

SHARED = Path(__file__).parents[3] / "shared" / "data" / "concepts" / "axbench_concept10_2b_l10"


def examples(name: str, count: int) -> list[Example]:
    return [Example(f"{name} asked {i}", f"{name} said {i}") for i in range(count)]


SHARED_NEGATIVES = examples("plain", 3)
SETS = [
    ConceptSet(
        name,
        {POSITIVE: examples(name, 2), NEGATIVE: SHARED_NEGATIVES},
        {
            POSITIVE: examples(f"{name} test", 2),
            NEGATIVE: examples(f"{name} not", 1),
            HARD: examples(f"{name} near", 1),
        },
        genre,
        ("do this", "do that"),
    )
    for name, genre in (("the sea", "text"), ("loops", "code"))
]


def test_written_sets_read_the_same(tmp_path: Path) -> None:
    files = write_concept_sets(SETS, tmp_path / "sets")
    assert [file.name for file in files] == ["train.parquet", "detection_eval.parquet", "metadata.jsonl"]
    found = read_concept_sets(tmp_path / "sets")
    for one, other in zip(found, SETS, strict=True):
        assert (one.concept, one.genre, list(one.steering_instructions)) == (
            other.concept,
            other.genre,
            ["do this", "do that"],
        )
        assert {k: list(v) for k, v in one.train.items()} == dict(other.train)
        assert {k: list(v) for k, v in one.test.items()} == dict(other.test)
    rows = pyarrow.parquet.read_table(files[0]).to_pylist()
    assert list(rows[0]) == list(COLUMNS)
    assert [row["concept_id"] for row in rows] == [-1] * 3 + [0] * 2 + [1] * 2  # shared ones once
    facts = [json.loads(line) for line in files[2].read_text(encoding="utf-8").splitlines()]
    assert [fact["concept_id"] for fact in facts] == [0, 1]


def test_labels() -> None:
    found, labels = SETS[0].labelled("test")
    assert labels == [1, 1, 0, 0] and found[3].text == "the sea near said 0"
    with pytest.raises(ValueError, match="part='dev'"):
        SETS[0].labelled("dev")
    with pytest.raises(ValueError, match="2 with, 0 without"):
        ConceptSet("x", {POSITIVE: examples("x", 2)}).labelled()
    with pytest.raises(ValueError, match="0 with, 3 without"):
        ConceptSet("x", {NEGATIVE: SHARED_NEGATIVES}).labelled()


def test_a_plain_table_is_one_set(tmp_path: Path) -> None:
    (tmp_path / "sea.csv").write_text("text,label\na wave,1\na road,0\na ship,1\n", encoding="utf-8")
    (found,) = read_concept_sets(tmp_path / "sea.csv")
    assert found.concept == "sea"
    assert found.train == {POSITIVE: [Example("", "a wave"), Example("", "a ship")], NEGATIVE: [Example("", "a road")]}
    (tmp_path / "sea.jsonl").write_text('{"said": "a wave", "y": 1}\n{"said": "a road", "y": 0}\n', encoding="utf-8")
    (found,) = read_concept_sets(tmp_path / "sea.jsonl", text_column="said", label_column="y")
    assert found.labelled()[1] == [1, 0]
    (tmp_path / "one.csv").write_text("text,label\na wave,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Both labels must occur"):
        read_concept_sets(tmp_path / "one.csv")


def test_broken_folders_are_told(tmp_path: Path) -> None:
    write_concept_sets(SETS, tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["output"]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"none of \['output'\]"):
        read_concept_sets(tmp_path)
    rows = [row for row in table.to_pylist() if row["concept_id"] == -1]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no concept in .* Received: 3 rows"):
        read_concept_sets(tmp_path)
    rows = [row for row in table.to_pylist() if row["concept_id"] == 0]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="2 with, 0 without"):
        read_concept_sets(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_axbench_concept10() -> None:
    found = read_concept_sets(SHARED)
    assert len(found) == 10 and [one.genre for one in found].count("code") == 4
    for one in found:
        assert {name: len(part) for name, part in one.train.items()} == {POSITIVE: 72, NEGATIVE: 216}
        assert len(one.test[POSITIVE]) == len(one.test[NEGATIVE]) == 36
    assert [len(one.test[HARD]) for one in found] == [5, 5, 4, 4, 6, 6, 7, 2, 3, 8]
    assert len({one.concept for one in found}) == 10
