"""The suite `intervention`: a feature that writes known tokens is told from one that does not; 0 changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_transformers import InterventionSuite, SaeForCausalLM, SparseAutoencoder, evaluate
from sae_transformers.evaluation.journal import Journal
from sae_transformers.evaluation.settings import BootstrapSettings, GenerationSettings
from sae_transformers.evaluation.suites.settings import InterventionSettings
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

PROMPTS = ["w1 w2 w3", "w9"]
GREEDY = GenerationSettings(max_new_tokens=6, temperature=0.0)
SETTINGS = InterventionSettings(
    interventions=5, intervention_strength=4.0, top_words=2, generation=GREEDY, bootstrap=BootstrapSettings(20)
)
PLANTED = {3: 40, 8: 61}  # feature -> the token that its decoder row raises


def planted() -> SparseAutoencoder:
    """Behind the last block, an SAE of which two features write one token each."""
    sae = tiny_sae(layer=2, site="resid_post")
    head = tiny_base().get_output_embeddings().weight.detach()
    with torch.no_grad():
        for feature, token in PLANTED.items():
            sae.W_dec[feature] = head[token] - head.mean(0)
    return sae


def model() -> SaeForCausalLM:
    return SaeForCausalLM.from_base(tiny_base(), saes=[planted()]).eval()


def test_planted_features_score_above_the_random_control() -> None:
    settings = replace(SETTINGS, similarity="input", intervention_samples=1)
    suite = InterventionSuite(PROMPTS, [(0, 3), (0, 8)], settings=settings)
    seen: list[int] = []
    found = suite(model(), word_tokenizer(), report=seen.append)
    assert sum(seen) == suite.steps(model()) == 3 * len(PROMPTS)
    by_feature = {row["feature"]: row for row in found.curves["by_feature"]}
    for feature, token in PLANTED.items():
        assert by_feature[feature]["words"][0] == word_tokenizer().convert_ids_to_tokens(token)
        assert by_feature[feature]["passed"] == 1.0
        assert by_feature[feature]["steered"] > by_feature[feature]["random"] + 0.3
    assert found.value("passed", "steered") == 1.0
    steered, random = (found.value("similarity", method) for method in ("steered", "random feature"))
    assert steered is not None and random is not None
    assert found.value("similarity_minus_random", "steered") == pytest.approx(steered - random)
    assert len(found.samples) == len(PROMPTS)
    assert found.samples[0]["steered"].split().count(word_tokenizer().convert_ids_to_tokens(40)) > 3


def test_texts_are_those_of_generate() -> None:
    found = InterventionSuite(PROMPTS, [(0, 3), (0, 20)], settings=replace(SETTINGS, intervention_samples=2))(
        made := model(), word_tokenizer()
    )
    assert made.steering is None or not made.steering  # as it was
    for sample, prompt in zip(found.samples, PROMPTS * 2, strict=True):
        ids = word_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        edit = [{"sae": 0, "feature": sample["feature"], "op": "direction", "value": 4.0, "unit": "norm"}]
        for name, steering in (("steered", {"edits": edit, "positions": [[1, None]]}), ("none", False)):
            new = made.generate(ids, max_new_tokens=6, do_sample=False, steering=steering)[0, ids.shape[1] :]
            assert sample[name] == word_tokenizer().decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_strength_of_0_gives_exactly_the_plain_score(temperature: float) -> None:
    generation = GenerationSettings(max_new_tokens=6, temperature=temperature)
    settings = replace(SETTINGS, intervention_strength=0.0, generation=generation)
    found = InterventionSuite(PROMPTS, settings=settings)(model(), word_tokenizer())
    plain = found.value("similarity", "none")
    assert found.value("similarity", "steered") == plain and found.value("perplexity", "steered") is not None
    assert found.value("similarity_change", "steered") == 0.0 == found.value("passed", "steered")
    assert found.value("similarity_minus_random", "steered") == pytest.approx(0.0, abs=1e-12)
    assert len(found.curves["by_feature"]) == 5 and found.settings["drawn"]


def test_features_are_drawn_among_those_that_fire() -> None:
    made = model()
    with torch.no_grad():
        made.saes[0].feature_max.zero_()[[3, 9, 44]] = 1.0
    suite = InterventionSuite(PROMPTS, settings=replace(SETTINGS, generation=replace(GREEDY, max_new_tokens=1)))
    assert suite.steps(made) == 4 * len(PROMPTS)
    assert [row["feature"] for row in suite(made, word_tokenizer()).curves["by_feature"]] == [3, 9, 44]


def test_a_stopped_run_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    settings = replace(SETTINGS, generation=replace(GREEDY, batch_size=3))
    suite = InterventionSuite(PROMPTS, settings=settings)
    whole = suite(model(), word_tokenizer())
    journal = Journal(tmp_path / "parts.jsonl", {})

    class Stopped(Exception):
        pass

    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        suite(model(), word_tokenizer(), report=stop, journal=journal)
    again = Journal(tmp_path / "parts.jsonl", {})
    assert again.found == 2
    continued = suite(model(), word_tokenizer(), journal=again)
    assert continued.measurements == whole.measurements and json.dumps(continued.curves) == json.dumps(whole.curves)


def test_it_runs_when_it_is_asked_for_and_is_kept(tmp_path: Path) -> None:
    suite = InterventionSuite(PROMPTS, settings=SETTINGS)
    found = evaluate(model(), word_tokenizer(), [suite], tmp_path)
    assert found.measured == ("intervention",) and found.rows("intervention")[0]["metric"] == "similarity"
    assert evaluate(model(), word_tokenizer(), [suite], tmp_path).found == ("intervention",)


@pytest.mark.parametrize(
    ("features", "settings", "told"),
    [
        ([(0, 3)], SETTINGS, "2 features or more"),
        ([(0, 3), (0, 99)], SETTINGS, "99"),
        (None, replace(SETTINGS, intervention_sae=1), "intervention_sae"),
    ],
)
def test_mistakes(features: list | None, settings: InterventionSettings, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        InterventionSuite(PROMPTS, features, settings=settings)(model(), word_tokenizer())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="similarity='glove'"):
        InterventionSettings(similarity="glove")
    with pytest.raises(ValueError, match="interventions"):
        InterventionSettings(interventions=1)
    with pytest.raises(ValueError, match="intervention_unit"):
        InterventionSettings(intervention_unit="std")
