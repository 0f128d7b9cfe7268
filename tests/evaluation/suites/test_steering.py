"""What tells one run of the suite `steering` from another, made in Python."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sae_transformers import DiffMean, FeatureEdit, Latents, Prompting, SteeringSuite, SteeringSuiteSettings
from sae_transformers.evaluation.steering_methods.default_steering import ScaledSteering
from sae_transformers.modeling import Steering
from tests.create_training_data.words import word_tokenizer


def lengths(texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def identity(*methods, settings: SteeringSuiteSettings | None = None) -> dict:
    suite = SteeringSuite(["w1", "w2"], methods, lengths, settings or SteeringSuiteSettings())
    found = suite.identity(word_tokenizer())
    return json.loads(json.dumps(found))


def test_another_method_strength_or_scorer_is_another_run() -> None:
    every = [
        identity(Latents([(0, 3)], strengths=(0.1,))),
        identity(Latents([(0, 3)], strengths=(0.2,))),
        identity(Latents([(0, 4)], strengths=(0.1,))),
        identity(Prompting("sail"), Latents([(0, 3)], strengths=(0.1,))),
        identity(DiffMean(["w1"], ["w2"])),
        identity(ScaledSteering(Steering([FeatureEdit(0, 3, "add", 1.0)]))),
        identity(ScaledSteering(Steering([FeatureEdit(0, 3, "add", 2.0)]))),
    ]
    assert len({json.dumps(one, sort_keys=True) for one in every}) == len(every)
    assert every[0] == identity(Latents([(0, 3)], strengths=(0.1,)))
    assert every[0]["scorer"].endswith("test_steering.lengths")
