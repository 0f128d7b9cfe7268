"""Cards of data, compared byte by byte, and what is no data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from sae_transformers.hub_cards.card_file import is_ours
from sae_transformers.hub_cards.dataset_card import dataset_card, is_dataset, read_dataset
from sae_transformers.hub_cards.facts import author_facts
from tests.hub_cards import folders
from tests.hub_cards.test_model_card import compare


def judged(folder: Path) -> Path:
    folder.mkdir()
    (folder / "judged.tsv").write_text(folders.ANNOTATIONS)
    return folder


@pytest.mark.parametrize("kind", ["harvest", "spans", "annotations"])
def test_a_card_of_each_kind(tmp_path: Path, kind: str) -> None:
    folder = {"harvest": folders.harvest, "spans": folders.spans, "annotations": judged}[kind](tmp_path / "data")
    facts = author_facts({"licence": "cc0-1.0", "training_data": "Letters."} if kind == "spans" else {})
    card = dataset_card(read_dataset(folder), facts)
    compare(card, f"dataset_{kind}.md")
    assert is_ours(card) and is_dataset(folder)
    parsed = DatasetCard(card)
    assert DatasetCard(str(parsed)).data.to_dict() == parsed.data.to_dict()
    assert "/home" not in card


def test_the_table_that_a_card_names_is_one_that_datasets_reads(tmp_path: Path) -> None:
    import pyarrow.parquet

    folder = folders.spans(tmp_path / "data")
    data = DatasetCard(dataset_card(read_dataset(folder))).data.to_dict()
    assert data["configs"] == [{"config_name": "default", "data_files": "spans.parquet"}]
    assert pyarrow.parquet.read_table(folder / "spans.parquet").num_rows == read_dataset(folder).rows == 3


def test_unfinished_broken_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Received"):
        read_dataset(tmp_path)
    assert not is_dataset(tmp_path)
    unfinished = folders.harvest(tmp_path / "unfinished")
    (unfinished / "complete.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        read_dataset(unfinished)
    lacking = folders.harvest(tmp_path / "lacking")
    (lacking / "shard-000001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must have 2 shards. Received: 1"):
        read_dataset(lacking)
    without = folders.spans(tmp_path / "without")
    (without / "spans.parquet").unlink()
    with pytest.raises(ValueError, match="must hold spans.parquet"):
        read_dataset(without)
    several = judged(tmp_path / "several")
    (several / "other.tsv").write_text(folders.ANNOTATIONS)
    with pytest.raises(ValueError, match=r"\['judged', 'other'\]"):
        read_dataset(several)


def test_of_explanations_and_judgements_the_latter_count(tmp_path: Path) -> None:
    folder = judged(tmp_path / "data")
    (folder / "explained.tsv").write_text("FeatureID\tVerify\tSummary\tWords\n1\tyes\tX.\tSpan 1: x\n")
    assert read_dataset(folder).table == "judged.tsv"


def test_a_store_of_another_library_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"format": "other"}))
    assert not is_dataset(tmp_path)
