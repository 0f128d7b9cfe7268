"""`evaluate` as a function: suites as objects, a record that grows, and the rows of RealToxicityPrompts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.fairness.stereotypes import SentencePair
from sae_transformers.evaluation.results import read_results
from sae_transformers.evaluation.settings import BootstrapSettings, GenerationSettings
from sae_transformers.evaluation.steering.scar import PromptRow
from sae_transformers.evaluation.steering_methods import DiffMean, Latents, OtherLatents, Prompting, ScaledSteering
from sae_transformers.evaluation.suites import (
    SUITES,
    DetectionSuite,
    FairnessSuite,
    ReconstructionSuite,
    ScarSuite,
    SpeedSuite,
    SteeringSuite,
)
from sae_transformers.evaluation.suites.settings import (
    DetectionSettings,
    FairnessSettings,
    ScarSettings,
    SpeedSettings,
    SteeringSuiteSettings,
)
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
    trained = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(trained.lm.parameters())).mul_(1.01)
    with pytest.raises(ValueError, match="of another model.*Received: another base_weights"):
        evaluate(trained, word_tokenizer(), suites, tmp_path)


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


def test_progress_ends_where_it_was_said_to_end(model: Any) -> None:
    """What `steps` tells before is what `report` told in the end, without steering by default and with it."""
    texts = [TEXTS[i] for i in range(4)]
    pairs = [SentencePair(f"{text} w1", f"{text} w2") for text in texts]
    settings = SteeringSuiteSettings(generation=GenerationSettings(3, samples_per_prompt=2), bootstrap=FEW)
    greedy = SteeringSuiteSettings(generation=GenerationSettings(3, 0.0), divergence=False, bootstrap=FEW)
    methods = [
        Latents(strengths=(1.0, 2.0)),
        ScaledSteering(),
        DiffMean(texts[:2], texts[2:], (1.0,)),
        Prompting("w1"),
    ]
    rows = [PromptRow("w1 w2", 0.1, "w3"), PromptRow("w4", 0.97, "w6 w7")]
    suites = [
        SteeringSuite(texts, methods, word_count, settings),
        SteeringSuite(texts, [OtherLatents(first=1), *methods], word_count, greedy),
        FairnessSuite({"pairs": pairs}, texts, (texts, texts[::-1]), FairnessSettings(bootstrap=FEW)),
        ScarSuite(rows, None, word_count, settings=ScarSettings((0.0, 1.0), continuation_tokens=2, bootstrap=FEW)),
    ]
    for suite in suites:
        for steering in (None, Steering([FeatureEdit(0, "sea", "direction", 1.0)])):
            model.steering = steering
            seen: list[int] = []
            try:
                suite(model, word_tokenizer(), report=seen.append)
            finally:
                total, model.steering = suite.steps(model), None
            assert sum(seen) == total, suite.name


def word_count(texts: Any) -> list[float]:
    return [float(len(text.split())) for text in texts]
