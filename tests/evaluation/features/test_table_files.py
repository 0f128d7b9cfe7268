"""A table reads back as it was written, from either file; the original's JSON is for people."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_transformers.evaluation.features.table import FeatureTable, LogitWeights
from sae_transformers.evaluation.features.table_files import (
    FILES,
    read_feature_table,
    table_columns,
    write_feature_table,
)

F64 = torch.float64
WEIGHTS = LogitWeights(
    torch.tensor([1 / 3, -1e-9], dtype=F64),
    torch.tensor([0.1, 0.0], dtype=F64),
    torch.tensor([0.7, torch.nan], dtype=F64),
    torch.tensor([3.0, torch.nan], dtype=F64),
    torch.tensor([[5, 2], [0, 1]]),
    torch.tensor([[0.1, 0.05], [0.3, 0.2]]),
    torch.tensor([[7, 8], [9, 10]]),
    torch.tensor([[-0.1, -0.05], [-3.5, -0.2]]),
)
PLAIN = FeatureTable(WEIGHTS, [[" café", "<0xE2>"], ["\n", "a,b\""]], [["日本", " w"], ["x", "y"]])  # fmt: skip
FULL = replace(
    PLAIN,
    log10_frequency=torch.tensor([-3.25, -10.0], dtype=F64),
    published_sparsity=torch.tensor([-2.5, -10.0], dtype=F64),
    dead=torch.tensor([False, True]),
    coherence=torch.tensor([0.25, 0.0], dtype=F64),
    contexts=[["one\ntwo, \"three\"", "vier"], []],
    context_scores=[[2.5, 1.25], []],
    notes={"summary": ["About coffee.", ""], "=more": ["=1+1", "- a list\rof two"]},
    facts={"model": "m", "tokens": 11},
)  # fmt: skip


@pytest.mark.parametrize("name", ["", "features.parquet", "features.csv"])
@pytest.mark.parametrize("table", [PLAIN, FULL, replace(FULL, contexts=[[], []], context_scores=[[], []])])
def test_round_trip(table: FeatureTable, name: str, tmp_path: Path) -> None:
    files = write_feature_table(table, tmp_path / "out")
    assert [file.name for file in files] == list(FILES) and sorted(
        p.name for p in (tmp_path / "out").iterdir()
    ) == sorted(FILES)
    found = read_feature_table(tmp_path / "out" / name)
    assert found.facts == table.facts and found.notes == table.notes
    first, second = table_columns(table), table_columns(found)
    assert list(first) == list(second)
    for column in first:
        assert repr(first[column]) == repr(second[column]), column
    assert found.weights.top_weights.dtype == torch.float32 and found.weights.top_ids.dtype == torch.int64


def test_the_form_of_the_original(tmp_path: Path) -> None:
    write_feature_table(FULL, tmp_path)
    text = (tmp_path / "features.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"feature_0": {"top_words": "café <0xE2>"}, "feature_1": {"top_words": ' a,b"'}}
    assert "café" in text and "Ġ" not in text


def test_the_csv_is_for_spreadsheets(tmp_path: Path) -> None:
    write_feature_table(FULL, tmp_path)
    with (tmp_path / "features.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == 2 and json.loads(rows[0]["top_tokens"]) == [" café", "<0xE2>"] and "café" in rows[0]["top_tokens"]
    )
    assert rows[1]["skewness"] == "" and rows[1]["dead"] == "1" and float(rows[0]["mean"]) == 1 / 3


def test_all_files_or_none(tmp_path: Path) -> None:
    write_feature_table(PLAIN, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with pytest.raises(TypeError):
        write_feature_table(replace(FULL, facts={"a set": {1}}), tmp_path)  # facts.json comes last
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_feature_table(tmp_path / "nothing")
    (tmp_path / "features.csv").write_text("feature,mean\n0,1\n")
    with pytest.raises(ValueError, match="features.csv without .'std'"):
        read_feature_table(tmp_path / "features.csv")
    (tmp_path / "features.parquet").write_text("no")
    with pytest.raises(ValueError, match="no Parquet"):
        read_feature_table(tmp_path)
    write_feature_table(FULL, tmp_path)
    file = tmp_path / "features.csv"
    lines = file.read_text(encoding="utf-8")
    file.write_text(lines.replace("\n1,", "\n7,", 1), encoding="utf-8")
    with pytest.raises(ValueError, match="0, 1, 2"):
        read_feature_table(file)
    file.write_text(lines + "2,3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="Received: 2 in features.csv, row 4"):
        read_feature_table(file)
    file.write_text(lines.replace("-3.25", "often"), encoding="utf-8")
    with pytest.raises(ValueError, match="log10_frequency.*often"):
        read_feature_table(file)
