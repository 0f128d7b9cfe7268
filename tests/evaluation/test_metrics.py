"""The metrics equal scikit-learn or a closed form, however their inputs are gathered."""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from scipy.stats import hmean
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, r2_score

from sae_transformers.evaluation.metrics import (
    L0,
    METRICS,
    CalibrationError,
    DeadShare,
    FirstDivergentToken,
    Fvu,
    KnowledgeSelection,
    LossRecovered,
    NormalizedMse,
    Repetition,
    SteeringScore,
    SwapSensitivity,
)

RANDOM = np.random.default_rng(0)
STATES = RANDOM.normal(size=(40, 6)) + 5
MADE = STATES + RANDOM.normal(size=(40, 6)) / 2


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> None:
    """What is gathered is written to a folder of the test."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


@pytest.mark.parametrize("name", METRICS)
def test_the_example_of_each_card_gives_its_answer(name) -> None:
    kind = METRICS[name]
    assert kind().compute(**kind.facts.example) == pytest.approx(dict(kind.facts.answer))


@pytest.mark.parametrize("name", METRICS)
def test_the_facts_fit_the_inputs(name) -> None:
    metric, facts = METRICS[name](), METRICS[name].facts
    assert list(facts.inputs) == list(facts.features) == list(metric.features)
    assert facts.name == name and facts.description in metric.description
    for word in (*facts.inputs, *dict(facts.options), *facts.answer):
        assert word in metric.inputs_description


def test_fvu_is_one_less_r2() -> None:
    expected = 1 - r2_score(STATES, MADE, multioutput="variance_weighted")
    assert Fvu().compute(predictions=MADE, references=STATES)["fvu"] == pytest.approx(expected)  # pyright: ignore
    assert Fvu().compute(predictions=STATES, references=STATES) == {"fvu": 0.0, "explained_variance": 1.0}
    mean = np.broadcast_to(STATES.mean(0), STATES.shape)
    assert Fvu().compute(predictions=mean, references=STATES)["fvu"] == pytest.approx(1)  # pyright: ignore


def test_what_is_gathered_in_batches_is_measured_together() -> None:
    whole = Fvu().compute(predictions=MADE, references=STATES)
    metric = Fvu()
    for start in range(0, 40, 16):
        metric.add_batch(predictions=MADE[start : start + 16], references=torch.from_numpy(STATES[start : start + 16]))
    assert metric.compute() == pytest.approx(whole)
    one = Fvu()
    for made, state in zip(MADE.tolist(), STATES.tolist(), strict=True):
        one.add(prediction=made, reference=state)
    assert one.compute() == pytest.approx(whole)
    assert metric.compute(predictions=STATES, references=STATES) == {"fvu": 0.0, "explained_variance": 1.0}


def test_metrics_of_like_inputs_combine() -> None:
    both: Any = evaluate.combine([Fvu(), NormalizedMse()])
    both.add_batch(predictions=MADE[:20], references=STATES[:20])
    both.add_batch(predictions=MADE[20:], references=STATES[20:])
    error = ((MADE - STATES) ** 2).sum(1) / (STATES**2).sum(1)
    found = both.compute()
    assert found["normalized_mse"] == pytest.approx(error.mean())
    assert found["fvu"] == pytest.approx(1 - r2_score(STATES, MADE, multioutput="variance_weighted"))


def test_l0_and_dead_share_count() -> None:
    active = [sorted(RANDOM.choice(50, size=RANDOM.integers(0, 9), replace=False).tolist()) for _ in range(12)]
    dense = np.zeros((12, 50))
    for row, indices in enumerate(active):
        dense[row, indices] = 1
    assert L0().compute(predictions=active) == {"l0": pytest.approx(dense.sum(1).mean())}
    dead = DeadShare().compute(predictions=active, d_sae=50)
    assert dead == {"dead_share": pytest.approx((dense.sum(0) == 0).mean())}
    assert DeadShare().compute(predictions=[[], []], d_sae=4) == {"dead_share": 1.0}
    assert L0().compute(predictions=[[], []]) == {"l0": 0.0}


def test_loss_recovered_at_its_ends() -> None:
    base, ablated = [2.0, 3.0], [7.0, 9.0]
    found = [
        LossRecovered().compute(predictions=sae, references=base, ablated=ablated)
        for sae in (base, ablated, [4.5, 6.0])
    ]
    assert [one["loss_recovered"] for one in found] == [1.0, 0.0, 0.5]  # pyright: ignore[reportOptionalSubscript]


def test_steering_score_is_the_harmonic_mean() -> None:
    ratings = RANDOM.uniform(0.1, 2, size=(3, 9))
    found = SteeringScore().compute(concept=ratings[0], instruction=ratings[1], fluency=ratings[2])
    assert found == {"steering_score": pytest.approx(hmean(ratings, axis=0).mean())}


def test_texts_and_tokens() -> None:
    assert Repetition().compute(predictions=["a a a a", "a b c d"]) == {"repetition": pytest.approx(0.25)}
    assert Repetition().compute(predictions=["a a a a"], n=1) == {"repetition": 0.75}
    tokens = {"predictions": [[1, 2, 3], [4], [5, 6]], "references": [[1, 2, 4], [4], [7, 6]]}
    assert FirstDivergentToken().compute(**tokens) == {"first_divergent_token": 1.0}


def test_knowledge_selection_is_accuracy_of_normalised_answers() -> None:
    answers, context, memory = ["The A.", "b", "c", "D"], ["a", "x", "c", "x"], ["x", "B", "x", "x"]
    found = KnowledgeSelection().compute(
        predictions=answers, context=[[one, "other"] for one in context], memory=[[one] for one in memory]
    )
    plain = [text.lower().removeprefix("the ").strip(".") for text in answers]
    assert found == {
        "em_context": accuracy_score([one.lower() for one in context], plain),
        "em_memory": accuracy_score([one.lower() for one in memory], plain),
    }


def test_calibration_error_of_scikit_learns_bins() -> None:
    confidence = RANDOM.uniform(size=300)
    correct = (RANDOM.uniform(size=300) < confidence**2).astype(int)
    for bins in (5, 15):
        accuracy, mean = calibration_curve(correct, confidence, n_bins=bins)
        share = np.histogram(confidence, bins, (0, 1))[0] / 300
        expected = (share[share > 0] * np.abs(accuracy - mean)).sum()
        found = CalibrationError().compute(predictions=confidence, references=correct, bins=bins)
        assert found == {"calibration_error": pytest.approx(expected)}
    assert CalibrationError().compute(predictions=confidence, references=correct) == {
        "calibration_error": pytest.approx(expected)  # 15 bins are the default
    }


def test_swap_sensitivity_in_closed_form() -> None:
    first, second = RANDOM.normal(size=30), RANDOM.normal(size=30)
    found: Any = SwapSensitivity().compute(predictions=second, references=first)
    assert found["delta_logit"] == pytest.approx(np.abs(first - second).mean())
    sigmoid = [1 / (1 + np.exp(-logits)) for logits in (first, second)]
    assert found["delta_probability"] == pytest.approx(np.abs(sigmoid[0] - sigmoid[1]).mean())
    assert found["flips"] == ((first > 0) != (second > 0)).mean()
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        (Fvu, {"predictions": [[1.0], [2.0, 3.0]], "references": [[1.0], [2.0]]}, "lengths \\[1, 2\\]"),
        (Fvu, {"predictions": [[1.0], [2.0]], "references": [[1.0], [1.0]]}, "Received: 2 tokens"),
        (DeadShare, {"predictions": [[3]], "d_sae": 3}, "d_sae=3"),
        (LossRecovered, {"predictions": [1.0], "references": [2.0], "ablated": [2.0]}, "Received: 2.0"),
        (CalibrationError, {"predictions": [1.5], "references": [1]}, "Received: 1.5"),
        (CalibrationError, {"predictions": [0.5], "references": [2]}, "\\[2.0\\]"),
        (CalibrationError, {"predictions": [0.5], "references": [1], "bins": 0}, "bins=0"),
        (Repetition, {"predictions": ["a"], "n": 0}, "n=0"),
    ],
)
def test_bad_input(metric, inputs, message) -> None:
    with pytest.raises(ValueError, match=message):
        metric().compute(**inputs)
