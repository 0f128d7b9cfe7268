"""`open_annotations` and `annotate`: every source that there is, and what then shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sae_transformers import (
    DashboardSettings,
    FeatureAnnotations,
    FeatureEdit,
    SaeForCausalLM,
    SpanSettings,
    SparseAutoencoder,
    Steering,
    annotate,
    dashboard,
    feature_table,
    find,
    load,
    open_annotations,
    spans,
    top_features,
)
from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.tables import AnnotationRow, write_annotations
from sae_transformers.hub_cards.facts import read_model
from sae_transformers.hub_cards.model_card import model_card
from sae_transformers.hub_cards.publish_checks import files_of, problems
from tests.create_training_data.annotation.sources.layouts import write_bulk, write_delphi
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEXTS = [text for text in word_texts(12) if len(text.split()) > 1]
MEANT = "remarks that mean the opposite"
EXPLAINED = [
    AnnotationRow(3, "Span 1: so funny", MEANT, "yes"), AnnotationRow(4, "Span 1: x", "Cannot Tell."),
    AnnotationRow(5, "", ""), AnnotationRow(6, "Span 1: x", "tab\there"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("annotations")
    tiny_base().save_pretrained(path / "base")
    word_tokenizer().save_pretrained(path / "base")
    SaeForCausalLM.from_base(str(path / "base"), saes=[tiny_sae(layer=1, k=4)]).save_pretrained(path / "model")
    write_bulk(path / "bulk")
    write_delphi(path / "delphi")
    return path


@pytest.fixture
def loaded(folder: Path) -> Any:
    return load(folder / "model")


def test_neuronpedia_and_delphi(folder: Path) -> None:
    assert open_annotations(folder / "bulk", n_features=64).description(3) == MEANT
    assert open_annotations(folder / "bulk" / "explanations" / "batch-0.jsonl.gz").description(3) == MEANT
    assert open_annotations(str(folder / "delphi"), module="layers.1").description(12) == "rivers"


@pytest.mark.parametrize("ending", [".tsv", ".parquet"])
def test_explanations_of_our_own(tmp_path: Path, ending: str) -> None:
    file = write_annotations(EXPLAINED, tmp_path / f"explained{ending}")
    for source in (file, EXPLAINED):
        notes = open_annotations(source, n_features=64)
        assert notes.described.tolist() == [3, 6] and notes.description(6) == "tab\there"
    with pytest.raises(ValueError, match="The SAE has 5 latents.*Received: 5"):
        open_annotations(file, n_features=5)


def test_spans_and_feature_tables_of_our_own(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer, _ = loaded
    settings = SpanSettings(max_length=32, top_n=2, window=4, activation="own")
    found = spans(model, tokenizer, TEXTS, settings, out=tmp_path / "spans")
    assert found.feature_max is not None
    notes = open_annotations(tmp_path / "spans", n_features=64)
    measured = torch.nan_to_num(torch.from_numpy(notes.maximum), nan=0.0)
    assert torch.equal(measured, found.feature_max.float()) and float(measured.max()) > 0
    table = feature_table(model, tokenizer, texts=TEXTS)
    table.save(tmp_path / "table")
    for source in (tmp_path / "table", table.table):
        frequency = open_annotations(source).frequency
        assert frequency is not None and table.table.log10_frequency is not None
        expected = (10**table.table.log10_frequency - 1e-10).clamp(min=0)
        torch.testing.assert_close(torch.from_numpy(frequency).double(), expected, atol=1e-6, rtol=1e-4)
    explained = replace(table.table, notes={"explanation": ["", "rivers", *[""] * 62]})
    assert open_annotations(explained).names(range(64)) == {1: "rivers"}


def test_rows_and_what_is_known_already() -> None:
    notes = open_annotations([{"feature": 3, "description": "rivers", "output_score": 0.5}])
    assert notes.number("output_score", 3) == 0.5 and open_annotations(notes) is notes


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("nothing", FileNotFoundError, "Expected annotations: .*delphi.*'.*nothing', which is not there"),
        ("notes.docx", ValueError, "Received: the file '.*notes.docx'"), ("empty", ValueError, "with none of these"),
        ("bad.parquet", ValueError, "is no Parquet file"), ("bad.tsv", ValueError, "has columns FeatureID and Words"),
    ],
)  # fmt: skip
def test_what_is_none_of_them(tmp_path: Path, name: str, kind: type[Exception], told: str) -> None:
    (tmp_path / "empty").mkdir()
    for file in ("notes.docx", "bad.parquet", "bad.tsv"):
        (tmp_path / file).write_text("x")
    with pytest.raises(kind, match=told):
        open_annotations(tmp_path / name)


def test_annotate_fills_maxima_and_everything_shows_the_descriptions(
    loaded: Any, folder: Path, tmp_path: Path
) -> None:
    model, tokenizer, _ = loaded
    model.saes[0].feature_max.zero_()
    rows = [{"feature": n, "description": f"kind <b>{n}</b>", "score": 0.5, "frequency": 0.25} for n in range(60)]
    notes = annotate(model, [folder / "bulk", rows])
    assert model.saes[0].annotations is notes and notes.of(3)[0].text == "kind <b>3</b>"
    norm = float(model.saes[0].W_dec[3].detach().norm())
    assert float(model.saes[0].feature_max[3]) == pytest.approx(12.5 / norm, rel=1e-5)
    plan = model.prepare_steering(Steering([FeatureEdit(0, "kind <b>3</b>", "add", 0.5, unit="max")]))
    assert plan is not None
    read = top_features(model, tokenizer, TEXTS[0], k=4)
    active = {row["feature"]: row["name"] for row in read.rows()}
    assert active and all(name == f"kind <b>{n}</b>" for n, name in active.items() if n < 60)
    assert "<b>" not in read._repr_html_().replace("&lt;b&gt;", "")
    page = dashboard(None, model, tokenizer, DashboardSettings(features=(3, 5, 63)))
    told = {row["feature"]: row for row in page.rows()}
    assert told[3]["explanation"] == "kind <b>3</b>" and not told[63]["explanation"]
    assert told[5]["maximum"] == 4.0 and told[5]["frequency"] == pytest.approx(0.3)
    text = page.save(tmp_path / "page.html").read_text()
    assert "kind <b>3" not in text
    model.save_pretrained(tmp_path / "saved")
    back = load(tmp_path / "saved").model
    assert torch.equal(back.saes[0].feature_max, model.saes[0].feature_max)
    assert find(back, "kind 3").best == 3


def test_the_card_says_how_many_are_described_and_the_file_can_be_published(
    loaded: Any, folder: Path, tmp_path: Path
) -> None:
    annotate(loaded.model, folder / "bulk")
    loaded.model.save_pretrained(tmp_path / "saved")
    text = model_card(read_model(tmp_path / "saved"))
    size = (tmp_path / "saved" / "annotations.parquet").stat().st_size / 1e6
    assert "`annotations.parquet`" in text and f"({size:.2g} MB)" in text
    assert "describes 2 of 64 features of SAE 0, from Neuronpedia" in text and "Licence of the descriptions:" in text
    found = problems({name: path for name, path in files_of(tmp_path / "saved").items() if "parquet" in name})
    assert found == []


def test_an_saes_own_frequencies_and_neuronpedia_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = tiny_sae(layer=1, k=4)
    with pytest.raises(ValueError, match="The SAE names no annotations of its own"):
        annotate(sae)
    save_file({"sparsity": torch.full((64,), -2.0)}, tmp_path / "sparsity.safetensors")
    sae.config.metadata.update(source=str(tmp_path), sparsity={"file": "sparsity.safetensors"})
    assert annotate(sae).number("frequency", 17) == pytest.approx(0.01)
    cached = tmp_path / "cache" / "neuronpedia" / "tiny-llama"
    cached.mkdir(parents=True)
    (folder / "bulk").rename(cached / "1-made-up-res-64")
    monkeypatch.setenv("SAE_TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    sae.config.metadata["neuronpedia_id"] = "tiny-llama/1-made-up-res-64"
    notes = annotate(sae)
    (cached / "1-made-up-res-64").rename(folder / "bulk")
    assert notes.description(3) == MEANT and notes.number("frequency", 17) == pytest.approx(0.01)
    assert notes.number("frequency", 3) == pytest.approx(0.002)


def test_annotations_of_another_sae_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="The SAE has 32 latents, numbered from 0. Received: '40'"):
        annotate(tiny_sae(layer=1, k=4, d_sae=32), folder / "bulk")
    with pytest.raises(ValueError, match="The annotations are of an SAE with 64 latents"):
        annotate(tiny_sae(layer=1, k=4, d_sae=32), FeatureAnnotations.from_rows([{"feature": 63, "frequency": 0.1}]))


# -- the command line ------------------------------------------------------------------------------------------------


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.usefixtures("command_line")
def test_annotate_keeps_them_and_find_searches_them(folder: Path, tmp_path: Path) -> None:
    said = invoke("annotate", folder / "model", folder / "bulk", "--out", tmp_path / "model")
    assert "2 of 64 features described" in said and "annotations.parquet: 0.0 MB" in said and "licence" in said
    assert MEANT in (found := invoke("find", tmp_path / "model", "opposite", "--out", tmp_path / "found.csv"))
    assert "1 features for 'opposite', by words" in found.replace("\n", " ")
    assert (tmp_path / "found.csv").read_text().splitlines()[1].startswith("0,3,")
    assert "0 features" in invoke("find", tmp_path / "model", "mountain")
    assert MEANT in invoke("find", folder / "bulk", "opposite")
    assert "one of auto" in invoke("find", folder / "bulk", "opposite", "--by", "magic", code=2).replace("\n", " ")
    tiny_sae(layer=1, k=4).save_pretrained(tmp_path / "sae")
    invoke("annotate", tmp_path / "sae", folder / "delphi")
    assert SparseAutoencoder.from_pretrained(tmp_path / "sae").annotations.description(12) == "rivers"
    wrong = invoke("annotate", tmp_path / "sae", tmp_path / "nowhere", code=2)
    assert "which is not there" in wrong.replace("\n", " ")


@pytest.mark.usefixtures("command_line")
def test_hostile_descriptions_on_a_terminal_and_in_a_table(tmp_path: Path) -> None:
    rows = ["\x1b[31mred river\x1b[0m", "=HYPERLINK('http://x') river", "[bold]river[/bold]", "<script>river</script>"]
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps({"index": n, "description": text}) + "\n" for n, text in enumerate(rows)))
    said = invoke("find", file, "river", "--out", tmp_path / "found.csv")
    assert "\x1b" not in said and "\\x1b[31mred" in said and "[bold]river[/bold]" in said
    assert "'=HYPERLINK" in (tmp_path / "found.csv").read_text()
    shown = find(open_annotations(file), "river")._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;" in shown
