"""Neuronpedia's import layout: the schema of its exports, our numbers in its units, and back again."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sae_transformers import DashboardSettings, DashboardSources, dashboard, open_annotations
from sae_transformers.cli import app
from sae_transformers.workflows.settings.dashboard import ExportSettings
from tests.tiny import tiny_sae
from tests.workflows.export.world import HOSTILE, TEXTS, Made, made

SETTINGS = ExportSettings("neuronpedia", vectors=True)
# The columns that Neuronpedia's own exporter writes, of which an importer knows each, and their kinds.
NUMBERS, TEXTS_OF, WHOLE = (list, float), (list, str), (list, int)
SCHEMA: dict[str, dict[str, Any]] = {
    "features": {
        "modelId": str, "layer": str, "index": str, "maxActApprox": float, "creatorId": str, "frac_nonzero": float,
        "freq_hist_data_bar_heights": WHOLE, "freq_hist_data_bar_values": NUMBERS,
        "logits_hist_data_bar_heights": NUMBERS, "logits_hist_data_bar_values": NUMBERS,
        "neuron_alignment_indices": WHOLE, "neuron_alignment_l1": NUMBERS, "neuron_alignment_values": NUMBERS,
        "correlated_neurons_indices": WHOLE, "correlated_neurons_l1": NUMBERS,
        "correlated_neurons_pearson": NUMBERS, "decoder_weights_dist": NUMBERS, "neg_str": TEXTS_OF,
        "neg_values": NUMBERS, "pos_str": TEXTS_OF, "pos_values": NUMBERS, "sourceSetName": str,
        "topkCosSimIndices": WHOLE, "topkCosSimValues": NUMBERS, "vector": NUMBERS, "vectorLabel": None,
        "hookName": str, "vectorDefaultSteerStrength": float, "hasVector": bool,
    },
    "explanations": {
        "id": str, "modelId": str, "layer": str, "index": str, "authorId": str, "description": str, "embedding": None,
        "typeName": None, "explanationModelName": None, "umap_x": None, "umap_y": None, "umap_cluster": None,
        "umap_log_feature_sparsity": None,
    },
    "activations": {
        "id": str, "tokens": TEXTS_OF, "index": str, "layer": str, "modelId": str, "maxValue": float,
        "maxValueTokenIndex": int, "minValue": float, "values": NUMBERS, "creatorId": str, "dataSource": None,
        "dataIndex": None, "dfaValues": NUMBERS, "dfaTargetIndex": None, "dfaMaxValue": None, "lossValues": NUMBERS,
        "logitContributions": None, "binMin": None, "binMax": None, "binContains": None, "qualifyingTokenIndex": int,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Made:
    return made()


@pytest.fixture(scope="module")
def folder(world: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("neuronpedia")
    world.found.export(path, SETTINGS)
    return path / "tiny-llama-it" / "1-sae-transformers-res-64"


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in sorted((folder / kind).glob("batch-*.jsonl.gz"))
        for line in gzip.decompress(file.read_bytes()).decode().splitlines()
    ]


@pytest.mark.parametrize("kind", SCHEMA)
def test_rows_are_those_of_the_schema(folder: Path, kind: str) -> None:
    found = rows(folder, kind)
    assert found and len({tuple(row) for row in found}) == 1  # the importer takes the columns of the first row
    assert set(SCHEMA[kind]) <= set(found[0]) <= set(SCHEMA[kind]) | {"createdAt"}
    for row in found:
        for name, wanted in SCHEMA[kind].items():
            if isinstance(wanted, tuple):
                assert type(row[name]) is list and all(isinstance(one, (wanted[1], int)) for one in row[name]), name
            else:
                assert row[name] is None if wanted is None else type(row[name]) is wanted, (name, row[name])
        assert (row["modelId"], row["layer"]) == ("tiny-llama-it", "1-sae-transformers-res-64")


def test_the_model_its_source_set_and_release_name_each_other(folder: Path) -> None:
    one = {
        name: json.loads((folder / f"{name}.jsonl").read_text())
        for name in ("model", "source", "sourceset", "release")
    }
    assert one["model"]["id"] == one["source"]["modelId"] == one["sourceset"]["modelId"] == "tiny-llama-it"
    assert one["source"]["setName"] == one["sourceset"]["name"] == "sae-transformers-res-64"
    assert one["source"]["id"] == folder.name and one["sourceset"]["releaseName"] == one["release"]["name"]
    assert one["model"]["instruct"] is True and all("createdAt" in row and "creatorId" in row for row in one.values())


def test_activations_are_ours_times_the_norm_of_the_decoder_row(world: Made, folder: Path) -> None:
    found, sae = rows(folder, "activations"), world.found.sae
    assert sae is not None and len(found) == len(world.spans.span)
    norms = sae.W_dec.detach().norm(dim=-1)
    scores = sorted((float(s * norms[f]), int(f)) for s, f in zip(world.spans.score, world.spans.feature, strict=True))
    told = sorted((max(row["values"]), int(row["index"])) for row in found)
    assert [f for _, f in told] == [f for _, f in scores]
    assert [v for v, _ in told] == pytest.approx([v for v, _ in scores], rel=1e-4)
    for row in found:
        assert len(row["tokens"]) == len(row["values"]) and row["values"][row["maxValueTokenIndex"]] == row["maxValue"]
        assert any("".join(row["tokens"]) in text for text in TEXTS)
    assert len({row["id"] for row in found}) == len(found) and all(len(row["id"]) == 25 for row in found)


def test_features_have_the_numbers_of_table_histograms_and_decoder(world: Made, folder: Path) -> None:
    found, page, sae = rows(folder, "features"), world.found.page, world.found.sae
    assert sae is not None and page.histograms is not None and page.table is not None
    assert [int(row["index"]) for row in found] == list(range(64))
    for feature, row in enumerate(found):
        norm = float(sae.W_dec[feature].detach().norm())
        assert row["maxActApprox"] == pytest.approx(norm * float(sae.feature_max[feature]), rel=1e-5)
        assert sum(row["freq_hist_data_bar_heights"]) == int(page.histograms.counts[feature].sum())
        assert row["frac_nonzero"] == pytest.approx(
            int(page.histograms.counts[feature].sum()) / page.histograms.n_tokens
        )
        assert row["pos_str"] == page.table.top_tokens[feature] and len(row["topkCosSimIndices"]) == 3
        assert [v * norm for v in row["pos_values"]] == pytest.approx(page.table.weights.top_weights[feature].tolist())
        assert (
            math.hypot(*row["vector"]) == pytest.approx(1, abs=1e-5) and row["hookName"] == "blocks.1.hook_resid_post"
        )


def test_descriptions_all_of_them_as_they_are(folder: Path) -> None:
    told = {}
    for row in rows(folder, "explanations"):
        told.setdefault(int(row["index"]), []).append(row["description"])
    expected = {3: ["remarks that mean the opposite", "irony"], 5: [HOSTILE], 9: ["names of rivers"]}
    assert told == expected


def test_what_we_write_we_read(world: Made, folder: Path) -> None:
    notes, sae = open_annotations(folder, n_features=64), world.found.sae
    assert sae is not None and notes.names(range(64)) == {
        3: "remarks that mean the opposite", 5: HOSTILE, 9: "names of rivers",
    }  # fmt: skip
    other = tiny_sae(layer=1, site="resid_post", k=4)
    other.feature_max.zero_()
    notes.fill_maxima(other)
    torch.testing.assert_close(other.feature_max, sae.feature_max, rtol=1e-5, atol=1e-6)
    assert (
        notes.neighbours is not None
        and notes.neighbours[3, :3].tolist() == rows(folder, "features")[3]["topkCosSimIndices"]
    )


def test_the_same_again_gives_the_same_rows(world: Made, tmp_path: Path) -> None:
    for name in ("a", "b"):
        world.found.export(tmp_path / name, SETTINGS)
    for kind in SCHEMA:
        first, second = (
            [{**row, "createdAt": 0} for row in rows(next((tmp_path / n).glob("*/*")), kind)] for n in "ab"
        )
        assert first == second


def test_batches_of_1024_features(world: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_transformers.workflows.export.neuronpedia.FEATURES_EACH", 30)
    seen: list[tuple[int, int]] = []
    files = world.found.export(tmp_path, ExportSettings("neuronpedia", "m", "s"), lambda *counts: seen.append(counts))
    assert seen == [(30, 64), (60, 64), (64, 64)] and len(files) == 4 + 3 * 3
    assert [len(rows(tmp_path / "m" / "1-s", kind)) for kind in ("features", "explanations")] == [64, 4]
    assert rows(tmp_path / "m" / "1-s", "features")[0]["vector"] == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"layout": "html"}, "one of neuronpedia, delphi. Received: layout='html'"),
        ({"model_id": "../up"}, r"`model_id` must be .*Received: '\.\./up'"),
        ({"model_id": "..".ljust(3, ".")}, "model_id"),
        ({"source_set": "a/b"}, "source_set='a/b'"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(world: Made, tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        world.found.export(tmp_path, ExportSettings(**{"layout": "neuronpedia", **settings}))
    assert not list(tmp_path.rglob("*.gz"))
    with pytest.raises(ValueError, match="layout='magic'"):
        ExportSettings("magic")


def test_rectified_pre_activations_and_pages_without_an_sae_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="collect spans with activation='own'"):
        made("relu").found.export(tmp_path, SETTINGS)
    bare = dashboard(DashboardSources(spans={3: []}), settings=DashboardSettings(features=(3,)))
    with pytest.raises(ValueError, match="give the dashboard `sae`, or a model"):
        bare.export(tmp_path, SETTINGS)


@pytest.mark.usefixtures("command_line")
def test_from_the_command_line(world: Made, tmp_path: Path) -> None:
    sae = world.found.sae
    assert sae is not None
    sae.save_pretrained(tmp_path / "sae")
    world.table.save(tmp_path / "table")
    words = ["--table", tmp_path / "table", "--sae", tmp_path / "sae", "--layout", "neuronpedia", "--model-id", "tiny"]
    result = CliRunner().invoke(app, ["dashboard", *map(str, words), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "64 features" in result.output
    assert open_annotations(tmp_path / "out" / "tiny" / "1-sae-transformers-res-64").description(5) == HOSTILE
