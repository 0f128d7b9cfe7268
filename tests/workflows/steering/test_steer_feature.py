"""`steer_feature` as a function: both ways from the same random numbers, by number or name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_transformers import GenerationSettings, SaeForCausalLM, SteerFeatureSettings, steer_feature
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

SETTINGS = SteerFeatureSettings(generation=GenerationSettings(4, 1.0, samples_per_prompt=2))


@pytest.fixture(scope="module")
def model() -> SaeForCausalLM:
    saes = [tiny_sae(layer=1), tiny_sae(layer=2, feature_names={"5": "rivers"})]
    return SaeForCausalLM.from_base(tiny_base(), saes=saes).eval()


def test_both_ways(model: SaeForCausalLM, tmp_path: Path) -> None:
    found = steer_feature(model, word_tokenizer(), "w1 w2 w3", "rivers", 40.0, SETTINGS, sae=1)
    assert (found.feature, found.sae, len(found.steered), len(found.unsteered)) == (5, 1, 2, 2)
    assert found.steered != found.unsteered
    nothing = steer_feature(model, word_tokenizer(), "w1 w2 w3", 5, 0.0, SETTINGS)
    assert nothing.steered == nothing.unsteered == found.unsteered
    assert list(found.to_frame()) == ["steered", "unsteered"] and "<table>" in found._repr_html_()
    json.dumps(found.to_dict())
    found.save(tmp_path / "texts.csv")
    assert (tmp_path / "texts.csv").read_text().startswith("steered,unsteered")


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ({"feature": 64}, {}, "64"),
        ({"sae": 2}, {}, "SAEs 0 to 1. Received: SAE 2"),
        ({}, {"layer": 2}, "layers.1.resid_post"),
        ({"prompt": ""}, {}, "0 tokens"),
    ],
)
def test_what_is_refused(model: SaeForCausalLM, arguments: dict, settings: dict, told: str) -> None:
    given: dict[str, Any] = {"prompt": "w1", "feature": 3, "strength": 1.0, **arguments}
    with pytest.raises(ValueError, match=told):
        steer_feature(model, word_tokenizer(), **given, settings=SteerFeatureSettings(**settings))


def test_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Received: unit='norms'"):
        SteerFeatureSettings(unit="norms")
    with pytest.raises(ValueError, match="`legacy` adds"):
        SteerFeatureSettings(unit="norm", legacy=True)
