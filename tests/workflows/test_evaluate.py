"""`evaluate` as a function: suites as objects, a record that grows, and the rows of RealToxicityPrompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.evaluation.results import read_results
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.evaluation.suites import SUITES, DetectionSuite, ReconstructionSuite, ScarSuite, SpeedSuite
from sae_transformers.evaluation.suites.settings import DetectionSettings, ScarSettings, SpeedSettings
from sae_transformers.latents.settings import ReadingSettings
from sae_transformers.workflows.evaluate import EvaluateSettings, evaluate, read_suites
from sae_transformers.workflows.settings.evaluate import evaluate_options
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_model, tiny_sae

TEXTS = word_texts(8, shortest=4)
READING, FEW = ReadingSettings(16), BootstrapSettings(5)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(saes=[tiny_sae(layer=1, site="resid_post", concepts={"sea": 9})], vocab_size=94).eval()


def test_suites_from_lists_and_a_record_that_goes_on(model: Any, tmp_path: Path) -> None:
    suites = [ReconstructionSuite(TEXTS, READING, FEW), SpeedSuite(SpeedSettings(8, 2, 1))]
    seen: list[tuple] = []
    found = evaluate(model, word_tokenizer(), suites, tmp_path, progress=lambda *told: seen.append(told))
    assert found.measured == ("reconstruction", "speed") and found.found == ()
    assert seen[-1] == ("speed", 3, 3) and max(one[1:] for one in seen if one[0] == "reconstruction") == (16, 16)
    assert found.path is not None and found.path == tmp_path / "results.json"
    assert read_results(found.path).to_dict() == found.to_dict()
    frame = found.to_frame()
    assert {"suite", "metric", "method", "value"} <= set(frame.columns) and len(frame) > 20
    assert "<table>" in found._repr_html_() and found.plot("speed", tmp_path / "speed.png")
    there = evaluate(model, word_tokenizer(), suites, tmp_path)
    assert there.found == ("reconstruction", "speed") and there.to_dict() == found.to_dict()
    other = evaluate(model, word_tokenizer(), [ReconstructionSuite(TEXTS[:5], READING, FEW)], tmp_path)
    assert other.measured == ("reconstruction",) and list(other.record.suites) == ["reconstruction", "speed"]
    again = evaluate(model, word_tokenizer(), suites[1:], tmp_path, EvaluateSettings(again=True))
    assert again.measured == ("speed",)


def test_without_a_folder_nothing_is_written(model: Any) -> None:
    labels = [number % 2 for number in range(40)]
    texts = [f"{'w1 w2' if label else 'w5 w6'} w{20 + i} w9" for i, label in enumerate(labels)]
    suite = DetectionSuite(texts, labels, [(0, "sea")], DetectionSettings((0,), (1,), trees=False, bootstrap=FEW))
    found = evaluate(model, word_tokenizer(), [suite])
    assert found.path is None and found.record.suites["detection"].value("auroc", "sea of SAE 0") is not None
    asked = found.record.suites["detection"].settings["asked"]
    assert asked["features"] == [[0, "sea"]] and asked["settings"]["seeds"] == [0] and "texts" not in asked


def test_every_suite_has_options_and_says_what_it_needs() -> None:
    options = evaluate_options()()
    assert [suite.name for suite in read_suites(options)] == ["speed"]
    for name, suite in SUITES.items():
        given = {field for field in suite.needs if field in json.dumps(_names(getattr(options, name)))}
        assert given == set(suite.needs)
        if suite.needs:
            with pytest.raises(ValueError, match=f"{name!r} needs"):
                read_suites(options, [name])


def _names(options: Any) -> list[Any]:
    return [_names(value) if hasattr(value, "__dataclass_fields__") else name for name, value in vars(options).items()]


def test_the_suite_scar_reads_real_toxicity_prompts(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    file = tmp_path / "rtp.jsonl"
    rows = [
        {"prompt": {"text": "w1 w2", "toxicity": 0.1}, "continuation": {"text": "w3", "toxicity": 0.2}},
        {"prompt": {"text": "w4 w5", "toxicity": 0.97}, "continuation": {"text": "w6 w7", "toxicity": None}},
        {"prompt": {"text": "w8", "toxicity": None}, "continuation": {"text": "w9", "toxicity": 0.5}},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Options: Any = evaluate_options()
    scar = ScarSuite.Options(str(file), scar_scorer="sentiment", settings=ScarSettings((1.0,), continuation_tokens=3))
    (suite,) = read_suites(Options(scar=scar, bootstrap=FEW), ["scar"])
    result = evaluate(model, word_tokenizer(), [suite]).record.suites["scar"]
    assert result.settings["prompts"] == 2 and result.settings["feature"] == "sea"
    assert result.value("toxicity", "factor 1") is not None
    broken = ScarSuite.Options(str(file), scar_scorer="sentiment")
    file.write_text(json.dumps({"text": "w1"}), encoding="utf-8")
    with pytest.raises(ValueError, match="Expected rows with `prompt`"):
        read_suites(Options(scar=broken), ["scar"])
