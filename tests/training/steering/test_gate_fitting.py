"""Fitted thresholds: their false alarms on fresh texts, the texts that open them, and input that makes no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Gate, ReadingSettings, SaeForCausalLM, Steering, fit_gate
from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.latents.progress import Count
from sae_transformers.training.steering.gate_fitting import _values, _wilson
from tests.create_training_data.words import word_tokenizer
from tests.tiny import VOCAB, tiny_base, tiny_sae

FEATURE = 3
SHORT = ReadingSettings(skip_first=0, tokens_per_batch=64)
GATES = {
    "prompt": Gate(feature=FEATURE, over="prompt", pre_activations=True),
    "mean": Gate(feature=FEATURE, over="prompt", pool="mean", pre_activations=True),
    "last": Gate(feature=FEATURE, over="last", pre_activations=True),
    "token": Gate(feature=FEATURE, pre_activations=True),
    "hysteresis": Gate(feature=FEATURE, above=1.0, until=0.25, pre_activations=True),
    "so far": Gate(feature=FEATURE, over="so_far", pre_activations=True),
    "mean so far": Gate(feature=FEATURE, over="so_far", pool="mean", pre_activations=True),
    "mean, but the first": Gate(feature=FEATURE, over="prompt", pool="mean", pre_activations=True, skip_first=1),
    "so far, but the first": Gate(feature=FEATURE, over="so_far", pre_activations=True, skip_first=1),
    "token, but the first": Gate(feature=FEATURE, pre_activations=True, skip_first=1),
    "activation": Gate(feature=FEATURE, over="prompt"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    sae = tiny_sae(dtype=torch.float64, activation="relu", layer=0, site="resid_post", concepts={"sea": FEATURE})
    return SaeForCausalLM.from_base(tiny_base("gpt2", dtype=torch.float64), saes=[sae]).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def texts(n: int, seed: int) -> list[list[int]]:
    """Token ids of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def values_of(model: Any, gate: Gate, rows: list[list[int]]) -> torch.Tensor:
    return _values(model, gate, rows, 2048, Count(None, 0))


def opened(model: Any, gate: Gate, ids: list[int]) -> bool:
    """Whether a steering with the gate changes the text's logits, read alone."""
    steering = Steering([FeatureEdit(feature=FEATURE, op="direction", value=3.0)], when=gate)
    row = torch.tensor([ids])
    with torch.no_grad():
        return not torch.equal(model(row, steering=steering).logits, model(row, steering=False).logits)


@pytest.mark.parametrize("kind", GATES)
def test_the_texts_that_open_the_gate_are_those_that_were_counted(model, tokenizer, kind):
    rows, labels = texts(60, seed=0), [0] * 40 + [1] * 20
    found = fit_gate(model, tokenizer, rows, labels, GATES[kind], false_alarm_rate=0.1, reading=SHORT)
    # Nudged, since the text that sets the threshold is at it, and its value depends on the batch by a last bit.
    gate = Gate(**{**vars(found.gate), "above": found.gate.above + 1e-9})
    opens = torch.tensor([opened(model, gate, row) for row in rows])
    assert int(opens[:40].sum()) == 40 - 37  # the ceil(0.9 * 41)-th smallest stays shut
    assert found.detection_rate == pytest.approx(float(opens[40:].double().mean()))
    assert found.false_alarm_rate == pytest.approx(4 / 41)
    assert (found.n_neutral, found.n_concept, found.n_cut) == (40, 20, 0)
    if kind == "hysteresis":
        assert found.gate.until == pytest.approx(found.gate.above - 0.75)


def test_fresh_neutral_texts_open_it_as_seldom_as_was_asked_for(model, tokenizer):
    compared = values_of(model, GATES["prompt"], texts(2000, seed=99))
    rates = []
    for seed in range(20):
        rows = texts(41, seed=seed + 1)
        found = fit_gate(model, tokenizer, rows, [0] * 39 + [1] * 2, GATES["prompt"], false_alarm_rate=0.1)
        rates.append(float((compared > found.gate.above).double().mean()))
        assert found.false_alarm_rate == pytest.approx(0.1)
    mean = sum(rates) / len(rates)
    assert 0.05 < mean < 0.15, rates  # 20 draws of Beta(4, 36): standard error 0.01


def test_a_feature_alone_and_its_name_stand_for_a_gate_over_the_prompt(model, tokenizer):
    rows, labels = ["w1 w2 w3", "w4 w5", "w6 w7 w8", "w9 w1"], [0, 0, 0, 1]
    found = fit_gate(model, tokenizer, rows, labels, "sea", false_alarm_rate=0.5)
    assert found.gate == Gate(feature="sea", over="prompt", skip_first=1, above=found.gate.above)
    assert fit_gate(model, tokenizer, rows, labels, FEATURE, false_alarm_rate=0.5).gate.above == found.gate.above
    assert found.to_dict()["gate"] == found.gate.to_dict()


def test_auroc_and_the_interval(model, tokenizer):
    rows, labels = texts(50, seed=4), [0] * 30 + [1] * 20
    found = fit_gate(model, tokenizer, rows, labels, GATES["token"], false_alarm_rate=0.2)
    assert found.auroc == pytest.approx(auroc(values_of(model, GATES["token"], rows), torch.tensor(labels)))
    low, high = found.detection_interval
    assert low < found.detection_rate < high
    # The ends of the interval are the shares from which what was seen lies 1.6449 standard errors away.
    for end in _wilson(8, 20):
        assert abs(0.4 - end) == pytest.approx(1.6449 * (end * (1 - end) / 20) ** 0.5)
    assert _wilson(0, 5)[0] == 0 and _wilson(5, 5)[1] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"false_alarm_rate": 0.01}, ValueError, "of 0.01 needs 99 neutral texts or more. Received: 3"),
        ({"false_alarm_rate": 0.0}, ValueError, "must lie between 0 and 1. Received: false_alarm_rate=0.0"),
        ({"gate": ~Gate(feature=1)}, ValueError, "on one latent, open above it; combine gates afterwards"),
        ({"gate": Gate(feature=1) & Gate(feature=2)}, ValueError, "combine gates afterwards"),
        ({"gate": None}, TypeError, "must be a Gate, or the index or name of a latent. Received: NoneType"),
        ({"gate": Gate(feature=1, sae=4)}, ValueError, "has SAEs 0 to 0. Received: SAE 4"),
        ({"gate": "river"}, ValueError, "river"),
        (
            {"gate": Gate(feature=1, skip_first=2)},
            ValueError,
            "skips 2 tokens needs texts of 3 tokens or more. Received: 2 in text 0",
        ),
        ({"labels": [0, 0, 0, 0]}, ValueError, "texts with and without the concept are needed"),
        ({"labels": [0, 1]}, ValueError, "one entry for each of 4 rows"),
        ({"reading": ReadingSettings()}, ValueError, "Which tokens count is said by the gate"),
        (
            {"texts": ["w1 w2", "w2 w3", "w3 w4", ""]},
            ValueError,
            "skips 1 tokens needs texts of 2 tokens or more. Received: 0 in text 3",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(model, tokenizer, options, error, message):
    given = {"texts": ["w1 w2", "w3 w4", "w4 w5", "w6 w7"], "labels": [0, 0, 0, 1], "gate": FEATURE, **options}
    rows, labels, gate = (given.pop(name) for name in ("texts", "labels", "gate"))
    with pytest.raises(error, match=message):
        fit_gate(model, tokenizer, rows, labels, gate, **{"false_alarm_rate": 0.5, **given})
