"""`dashboard` from Python: the numbers that the library, `detect` and the server give, and results of other verbs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sae_transformers import (
    AttributionSettings,
    DashboardSettings,
    DashboardSources,
    DetectSettings,
    SaeForCausalLM,
    SpanSettings,
    attribute,
    dashboard,
    detect,
    feature_table,
    load,
    spans,
    top_features,
)
from sae_transformers.cli import app
from sae_transformers.evaluation.settings import GenerationSettings
from sae_transformers.serving.detecting import Detecting, Detector
from sae_transformers.workflows.settings.dashboard import SteeredSamplesSettings
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEXTS = [text for text in word_texts(12) if len(text.split()) > 1]
SMALL: dict[str, Any] = {"max_length": 32, "top_n": 2, "window": 4, "activation": "own"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard")
    tiny_base().save_pretrained(path / "base")
    word_tokenizer().save_pretrained(path / "base")
    SaeForCausalLM.from_base(str(path / "base"), saes=[tiny_sae(layer=1, k=4)]).save_pretrained(path / "model")
    (path / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder / "model")


def test_the_page_shows_what_top_features_detect_and_the_server_say(loaded: Any) -> None:
    model, tokenizer, _ = loaded
    found = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL))
    made = dashboard(DashboardSources(spans=found), model, tokenizer, texts=TEXTS)
    read = [top_features(model, tokenizer, text, k=4) for text in TEXTS]
    compared = 0
    for feature, shown in made.page.spans.items():
        for rank, one in enumerate(shown):
            entry = (found.feature == feature).nonzero()[rank, 0]
            assert one.text is not None
            begin = int(found.position[entry]) - one.peak
            tokens = read[one.text]
            for place, value in enumerate(one.activations, begin):
                here = (tokens.features[place] == feature).nonzero()
                expected = float(tokens.values[place, here[0, 0]]) if len(here) else 0.0
                if value is not None and not math.isnan(value):  # nan: the first token, which does not count
                    assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
                    compared += expected > 0
    assert compared > 50
    largest = {row["feature"]: row["Largest activation"] for row in made.rows()}
    settings = DetectSettings(pooling="max", max_length=32)
    strongest = sorted(largest, key=lambda feature: -largest[feature])[:5]
    for feature in strongest:
        scores = detect(model, tokenizer, TEXTS, feature, settings=settings).scores
        assert largest[feature] == pytest.approx(float(scores.max()), rel=1e-3)  # the page has four digits
        ids = tuple(tuple(tokenizer(text)["input_ids"]) for text in TEXTS)
        asked = Detecting(ids, 0, feature, "max", False, 1, False)
        served = [entry["score"] for entry in Detector(model, tokenizer, "m").detect(asked)["data"]]
        torch.testing.assert_close(torch.tensor(served), scores, rtol=1e-5, atol=1e-6)


def test_results_of_other_verbs_in_memory(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer, _ = loaded
    sources = DashboardSources(
        table=feature_table(model, tokenizer).table, spans=spans(model, tokenizer, TEXTS, SpanSettings(**SMALL)),
        names={"SAE": "org/mine"},
    )  # fmt: skip
    samples = SteeredSamplesSettings((3,), (0.5,), GenerationSettings(max_new_tokens=3))
    settings = DashboardSettings(features=(3, 5), title="mine", samples=samples)
    reports: list[tuple[int, int]] = []
    found = dashboard(
        sources, model, tokenizer, settings, prompts=["w1 w2"], progress=lambda *at: reports.append(at)
    )  # fmt: skip
    assert found.features == [3, 5] and len(found.samples) == 2 and reports[-1] == (2, 2)
    assert found.page.facts["SAE"] == "org/mine" and found.page.facts["Base model"] == "base"
    assert [len(found.page.neighbours[feature]) for feature in (3, 5)] == [6, 6]
    assert list(found.to_frame()["feature"]) == [3, 5] and "<table>" in found._repr_html_()
    assert found.to_dict()["title"] == "mine" and set(found.page.samples) == {3}
    done: list[tuple[int, int]] = []
    assert found.save(tmp_path / "page.html", lambda *at: done.append(at)) == tmp_path / "page.html"
    assert done[-1] == (2, 2) and "mine" in (tmp_path / "page.html").read_text()
    found.save_samples(tmp_path / "samples.json")
    assert json.loads((tmp_path / "samples.json").read_text()) == found.samples


def test_what_features_raise(loaded: Any, folder: Path, tmp_path: Path) -> None:
    """Effects that `attribute` found, in memory and by the verbs' files: summed over tokens, the largest first."""
    model, tokenizer, _ = loaded
    quick = AttributionSettings(check=0, curve=False)
    found = [attribute(model, tokenizer, text, "w3", settings=quick) for text in TEXTS[:3]]
    page = dashboard(DashboardSources(attributions=found), model, tokenizer).page
    expected: dict[int, list[float]] = {}
    for one in found:
        for row in one.strongest(1000):
            expected.setdefault(row["feature"], []).append(row["effect"])
    assert set(page.raised) == set(expected)
    for feature, rows in page.raised.items():
        assert [row.effect for row in rows] == pytest.approx(sorted(expected[feature], key=lambda e: -abs(e)))
        assert {row.target for row in rows} == {"'w3'"}
    files = []
    for number, one in enumerate(found):
        one.save(tmp_path / f"{number}.json")
        files += ["--attributions", str(tmp_path / f"{number}.json")]
    command = ["dashboard", str(folder / "model"), *files, "--out", str(tmp_path / "page.html"), "--no-compress"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "'w3'" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="Expected what `attribute` found"):
        dashboard(DashboardSources(attributions=[{"a": 1}]), model, tokenizer)


def test_what_is_missing_is_told(loaded: Any) -> None:
    model, tokenizer, _ = loaded
    with pytest.raises(ValueError, match="Give at least `table`, `spans` or `sae`"):
        dashboard()
    with pytest.raises(ValueError, match="need `model` and `sae`"):
        dashboard(sae=tiny_sae(layer=1), texts=TEXTS)
    with pytest.raises(ValueError, match="needs `prompts`"):
        dashboard(None, model, tokenizer, DashboardSettings(samples=SteeredSamplesSettings((3,))))
    with pytest.raises(ValueError, match="SAEs 0 to 0"):
        dashboard(None, model, tokenizer, DashboardSettings(number=1))
    found = spans(model, tokenizer, TEXTS, SpanSettings(**SMALL))
    with pytest.raises(ValueError, match="the text that `spans` was collected on. Received: rows was"):
        dashboard(DashboardSources(spans=found), model, tokenizer, texts=TEXTS[:3])
    with pytest.raises(ValueError, match="other than 0"):
        SteeredSamplesSettings(strengths=(0.0, 1.0))


def test_an_sae_alone_has_names_and_neighbours() -> None:
    found = dashboard(sae=tiny_sae(layer=1, concepts={"sea": 9}))
    assert len(found.features) == 64 and found.page.names == {9: "sea"} and len(found.page.neighbours[9]) == 6


def test_a_saved_model_and_old_spellings(folder: Path, tmp_path: Path) -> None:
    words = ["dashboard", str(folder / "model"), "--texts", str(folder / "texts.txt")]
    words += ["--out", str(tmp_path / "a.html")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "64 features" in result.output
    words = ["dashboard", "--model", *words[1:-1], str(tmp_path / "b.html"), "--sae-number", "0", "--new-tokens", "3"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[:3] == [
        "--model is now the first argument.", "--sae-number is now --number.", "--new-tokens is now --max-new-tokens."
    ]  # fmt: skip
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
