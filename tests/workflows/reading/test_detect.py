"""Texts are scored alike by the library, the workflow, the verb and the server, whatever holds the texts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

import sae_transformers
from sae_transformers import DetectSettings, SaeForCausalLM, detect, load, top_features
from sae_transformers.cli import app
from sae_transformers.latents.texts import open_text
from sae_transformers.serving.detecting import Detecting, Detector
from tests.create_training_data.words import word_tokenizer
from tests.figures import drawn
from tests.tiny import tiny_base, tiny_sae

TEXTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12", " ".join(f"w{i}" for i in range(5, 25)), "w3 w4", "w40 w41 w42"]
LABELS = [1, 0, 1, 0, 1, 0]
FEATURE = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its base's tokenizer beside the base only, and texts."""
    folder = tmp_path_factory.mktemp("detect")
    tiny_base().save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    SaeForCausalLM.from_base(str(folder / "base"), saes=[tiny_sae(layer=1)]).save_pretrained(folder / "model")
    tiny_sae(layer=1).save_pretrained(folder / "sae")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder / "model")


def by_hand(model: Any, tokenizer: Any, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        dense = model(ids, output_features=True).sae_features[0].to_dense()[0, 1:, FEATURE]
    return float(dense.mean()) if len(dense) else float("nan")


def test_library_workflow_verb_and_server_give_one_score(folder, loaded, tmp_path):
    model, tokenizer, _ = loaded
    expected = torch.tensor([by_hand(model, tokenizer, text) for text in TEXTS])
    assert torch.isnan(expected).tolist() == [False, True, False, False, False, False]
    assert (expected[~expected.isnan()] > 0).any()
    found = detect(model, tokenizer, TEXTS, FEATURE)
    torch.testing.assert_close(found.scores, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    alone = [model.detect(tokenizer(text, return_tensors="pt"), feature=FEATURE).per_text for text in TEXTS]
    torch.testing.assert_close(torch.cat(alone), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    long = [i for i, text in enumerate(TEXTS) if " " in text]
    asked = Detecting(
        tuple(tuple(tokenizer(TEXTS[i])["input_ids"]) for i in long), 0, FEATURE, "mean", False, 1, False
    )
    served = [entry["score"] for entry in Detector(model, tokenizer, "m").detect(asked)["data"]]
    torch.testing.assert_close(torch.tensor(served), expected[long], rtol=1e-5, atol=1e-6)
    out = tmp_path / "scores.csv"
    for model_options in ([str(folder / "model")], [str(folder / "base"), "--sae", str(folder / "sae")]):
        command = ["detect", *model_options[:1], str(folder / "texts.jsonl"), "--feature", "3", "--out", str(out)]
        result = CliRunner().invoke(app, [*command, *model_options[1:]])
        assert result.exit_code == 0, result.output
        assert "1 texts have no token after the first 1" in result.output
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["score"] for row in rows] == ["" if s != s else f"{s:.6g}" for s in found.scores.tolist()]
        assert [row["label"] for row in rows] == [str(label) for label in LABELS]


@pytest.mark.parametrize("form", ["list", "dataset", "streaming", "frame", "path", "source", "rows", "ids", "encoded"])
def test_texts_come_as_people_have_them(form, folder, loaded):
    model, tokenizer, _ = loaded
    expected = detect(model, tokenizer, TEXTS, FEATURE).scores
    columns = {"text": TEXTS, "label": LABELS}
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True)
    texts: Any = {
        "list": TEXTS, "dataset": Dataset.from_dict(columns), "frame": pandas.DataFrame(columns),
        "streaming": Dataset.from_dict(columns).to_iterable_dataset(), "path": folder / "texts.jsonl",
        "source": open_text(str(folder / "texts.jsonl")), "rows": [{"text": text} for text in TEXTS],
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS], "encoded": encoded,
    }[form]  # fmt: skip
    found = detect(model, tokenizer, texts, FEATURE).scores
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_quality_is_told_beside_always_yes(loaded):
    model, tokenizer, _ = loaded
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 45)]
    scores = detect(model, tokenizer, texts, FEATURE).scores
    labels = [int(score > scores.median()) for score in scores.tolist()]
    quality = detect(model, tokenizer, texts, FEATURE, labels).quality()
    assert quality["auroc"] == 1.0 and quality["f1"] > 0.9
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[20:]
    share = sum(labels[i] for i in order.tolist()) / 20
    assert quality["f1_always_yes"] == pytest.approx(2 * share / (1 + share))
    assert detect(model, tokenizer, texts, FEATURE, [1] * 40).quality() == {}


def test_cut_texts_are_counted_and_results_are_shown(loaded, tmp_path):
    model, tokenizer, _ = loaded
    found = detect(model, tokenizer, TEXTS, FEATURE, LABELS, DetectSettings(max_length=4))
    assert found.cut == 1 and found.missing == 1
    told = found.to_dict()
    assert told["cut"] == 1 and told["settings"]["max_length"] == 4 and told["texts"] == 6
    assert list(found.to_frame().columns) == ["row", "score", "label", "text"]
    assert found._repr_html_().count("<tr>") == 7


def test_what_is_no_text_is_refused(loaded, folder):
    model, tokenizer, _ = loaded
    with pytest.raises(TypeError, match="Expected texts: a string.*Received: float"):
        detect(model, tokenizer, 3.5, FEATURE)
    with pytest.raises(ValueError, match="a label for each of 6 texts. Received: 2 labels"):
        detect(model, tokenizer, TEXTS, FEATURE, [1, 0])
    with pytest.raises(ValueError, match="pooling='avg'"):
        DetectSettings(pooling="avg")
    result = CliRunner().invoke(app, ["detect", "no-such-model", "none.csv", "--feature", "3", "--pooling", "avg"])
    assert result.exit_code == 2 and "pooling='avg'" in result.output  # before anything is read
    with pytest.raises(ValueError, match="has SAEs of its own"):
        load(folder / "model", saes=str(folder / "sae"))
    with pytest.raises(ValueError, match="has no SAE: give one with `saes=`"):
        load(folder / "base")


def test_old_spellings_are_taken_with_a_note(folder):
    command = ["detect", str(folder / "base"), str(folder / "texts.jsonl"), "--sae", str(folder / "sae")]
    result = CliRunner().invoke(app, [*command, "--feature", "3", "--place", "layers.0.resid_post"])
    assert result.exit_code == 0 and "--place is now --hook-point" in result.output
    shown = CliRunner().invoke(app, ["detect", "--help"]).output
    assert "--hook-point" in shown and "--place" not in shown


def test_the_features_of_a_text(folder, loaded, tmp_path):
    model, tokenizer, _ = loaded
    text = TEXTS[3]
    found = top_features(model, tokenizer, text, k=4, names={FEATURE: "sea"})
    dense = (
        model(tokenizer(text, return_tensors="pt")["input_ids"], output_features=True).sae_features[0].to_dense()[0]
    )
    dense = dense.detach()
    dense[0] = 0
    values, _ = dense.topk(4, dim=-1)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-6)
    best = found.strongest(3)
    assert best[0]["max"] == pytest.approx(float(dense.max()), rel=1e-5)
    assert (
        best[0]["feature"] == int(dense.amax(0).argmax())
        and best[0]["at"].strip() == f"w{5 + int(dense.amax(1).argmax())}"
    )
    assert [row["max"] for row in best] == sorted((row["max"] for row in best), reverse=True)
    assert (FEATURE in found.names) == bool((found.features == FEATURE).any())
    assert found._repr_html_().count("<span") == 20
    result = CliRunner().invoke(
        app, ["features", str(folder / "model"), text, "--out", str(tmp_path / "f.csv"), "--k", "4"]
    )
    assert result.exit_code == 0, result.output
    assert str(best[0]["feature"]) in result.output
    with (tmp_path / "f.csv").open(newline="") as file:
        assert [int(row["feature"]) for row in csv.DictReader(file)] == [row["feature"] for row in found.rows()]
    with pytest.raises(ValueError, match="Expected one text. Received: 6"):
        top_features(model, tokenizer, TEXTS)


def test_a_plot_has_a_bar_for_each_of_the_strongest_features(folder, monkeypatch):
    figures = drawn(monkeypatch)
    model, tokenizer, _ = load(folder / "model")
    found = top_features(model, tokenizer, TEXTS[3], names={FEATURE: "sea"})
    found.plot("a.png", k=5)
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [row["max"] for row in found.strongest(5)]
    assert [text.get_text().split()[0] for text in axes.get_yticklabels()] == [
        str(row["feature"]) for row in found.strongest(5)
    ]


def test_a_plot_shows_the_scores_of_each_label(folder, monkeypatch):
    figures = drawn(monkeypatch)
    model, tokenizer, _ = load(folder / "model")
    found = detect(model, tokenizer, TEXTS, FEATURE, LABELS)
    found.plot("a.png")
    (axes,) = figures[0].axes
    scored = [row["label"] for row in found.rows() if row["score"] is not None]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == [f"label {label} (n = {scored.count(label)})" for label in (1, 0)]
    shares = [bar.get_height() for bar in axes.patches]
    assert len(shares) == 40 and sum(shares[:20]) == pytest.approx(1) == pytest.approx(sum(shares[20:]))


def test_the_verbs_are_at_the_root():
    assert sae_transformers.detect is detect and sae_transformers.top_features is top_features


def test_the_verb_says_how_many_texts_were_cut_and_where(folder, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"text": " ".join(["w5 w6"] * 100)}) + "\n" + json.dumps({"text": "w5 w6"})
    )
    result = CliRunner().invoke(app, ["detect", str(folder / "model"), str(tmp_path / "long.jsonl"), "--feature", "3"])
    assert result.exit_code == 0 and "1 texts were cut at 128 tokens" in result.output
