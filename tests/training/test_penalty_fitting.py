"""Fitted penalties: what they cost by the model's own loss, by plain torch, and input that makes no sense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import FeaturePenalty, SaeForCausalLM, fit_penalty
from tests.create_training_data.words import word_tokenizer
from tests.tiny import VOCAB, tiny_base, tiny_sae

F64 = torch.float64
FEATURES = {"sea": 2.0, 17: 1.0, 40: 0.5}
KINDS = {
    "pre-activation": FeaturePenalty(FEATURES),
    "activation, squared": FeaturePenalty(FEATURES, of="activation", power=2),
    "share": FeaturePenalty({"sea": 1.0, 5: 3.0}, of="share"),
    "above": FeaturePenalty(FEATURES, goal="above", skip_first=2),
    "one": FeaturePenalty(17, over="mask", name="seventeen"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    sae = tiny_sae(dtype=F64, activation="relu", layer=0, site="resid_post", concepts={"sea": 3})
    return SaeForCausalLM.from_base(tiny_base("gpt2", dtype=F64), saes=[sae]).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def texts(n: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def ordered(model: Any, rows: list[list[int]], features: Any) -> list[int]:
    """Labels by what the features read, so that there is something to fit."""
    latents = [model.config.sae_configs[0].resolve_feature(feature) for feature in features]
    means = torch.stack([states(model, row, 1)[:, latents].mean() for row in rows])
    return (means > means.median()).long().tolist()


@torch.no_grad()
def states(model: Any, row: list[int], skip: int) -> Tensor:
    """Pre-activations of all latents at the tokens that count."""
    hidden = model(torch.tensor([row]), steering=False, output_sae_inputs=True).sae_inputs[0]
    return model.saes[0].encode_pre_acts(hidden)[0, skip:]


@torch.no_grad()
def costs_in_the_loss(model: Any, penalty: FeaturePenalty, rows: list[list[int]]) -> float:
    """Mean cost of a token by the term that the model adds to its loss, read text by text."""
    model.feature_penalties = [replace(penalty, over="all")]
    total = 0.0
    for row in rows:
        ids = torch.tensor([row])
        with_term, term = model(ids, labels=ids), f"penalty_{penalty.name or 0}"
        total += penalty.weight * float(with_term.sae_losses[term]) * (len(row) - 1)  # a mean over the labels
    model.feature_penalties = None
    return total / sum(len(row) - penalty.skip_first for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_charges_one_kind_of_text_so_many_nats_more(model, tokenizer, kind):
    penalty, rows = KINDS[kind], texts()
    labels = ordered(model, rows, [feature for feature, _ in penalty.features])
    found = fit_penalty(model, tokenizer, rows, labels, penalty, nats=0.7)
    kinds = [[row for row, label in zip(rows, labels, strict=True) if label == side] for side in (1, 0)]
    trait, good = (costs_in_the_loss(model, found.penalty, side) for side in kinds)
    assert trait - good == pytest.approx(-0.7 if penalty.goal == "above" else 0.7, rel=1e-9)
    assert (found.trait_cost, found.good_cost) == pytest.approx((trait, good), rel=1e-9)
    assert [found.n_trait, found.n_good] == [sum(len(r) - penalty.skip_first for r in side) for side in kinds]
    same = {"margin": 0.0, "weight": 1.0, "features": penalty.features}
    assert replace(found.penalty, **same) == replace(penalty, **same)


@pytest.mark.parametrize("goal", ["below", "above"])
def test_nine_tokens_of_ten_that_are_as_they_should_be_cost_nothing(model, tokenizer, goal):
    rows = texts()
    labels = ordered(model, rows, [17])
    found = fit_penalty(model, tokenizer, rows, labels, FeaturePenalty([17, 40], goal=goal))
    kept = [row for row, label in zip(rows, labels, strict=True) if label == (goal == "above")]
    values = torch.cat([states(model, row, 1)[:, [17, 40]] for row in kept])
    margins = torch.tensor(found.penalty.margin, dtype=F64)
    excess = values - margins if goal == "below" else margins - values
    free = (excess <= 1e-9).double().mean(0)  # the token at the margin itself may differ by a last bit
    assert torch.allclose(free, torch.full((2,), 0.9, dtype=F64), atol=1 / len(values))


def test_features_count_alike_whatever_their_scale(model, tokenizer):
    rows = texts()
    labels = ordered(model, rows, [17])
    found = fit_penalty(model, tokenizer, rows, labels, FeaturePenalty({17: 3.0, 40: 1.0}))
    spread = torch.cat([states(model, row, 1)[:, [17, 40]] for row in rows]).std(0)
    (_, first), (_, second) = found.penalty.features
    assert first * float(spread[0]) / (second * float(spread[1])) == pytest.approx(3.0, rel=1e-9)


def test_a_feature_alone_stands_for_a_penalty_on_it(model, tokenizer):
    rows = texts()
    labels = ordered(model, rows, [3])
    found = fit_penalty(model, tokenizer, rows, labels, "sea").penalty
    assert found == fit_penalty(model, tokenizer, rows, labels, FeaturePenalty("sea")).penalty
    assert found.features[0][0] == "sea" and found.goal == "below"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"penalty": FeaturePenalty(3, goal="zero")}, ValueError, "have a margin. Received: goal='zero'"),
        ({"penalty": 3.5}, TypeError, "Expected a FeaturePenalty or its dict"),
        ({"penalty": "lake"}, ValueError, "lake"),
        ({"penalty": FeaturePenalty(3, sae=2)}, ValueError, "has 1 SAE"),
        ({"quantile": 1.0}, ValueError, "`quantile` must be between 0 and 1. Received: quantile=1.0"),
        ({"nats": 0}, ValueError, "`nats` must be a number above 0. Received: nats=0"),
        ({"nats": float("nan")}, ValueError, "`nats` must be a number above 0"),
        ({"labels": [1] * 40}, ValueError, "texts with and without the concept are needed"),
        ({"labels": [0, 1]}, ValueError, "one entry for each of 40 rows"),
        ({"penalty": FeaturePenalty(17, skip_first=50)}, ValueError, "of more than 50 token"),
        ({"labels": "turned"}, ValueError, "Expected features that rise above what is usual with the trait"),
    ],
)
def test_what_makes_no_sense_is_refused(model, tokenizer, options, error, message):
    rows = texts()
    labels = ordered(model, rows, [17])
    given: dict[str, Any] = {"penalty": 17, "labels": labels, **options}
    given["labels"] = [1 - label for label in labels] if given["labels"] == "turned" else given["labels"]
    penalty, labels = given.pop("penalty"), given.pop("labels")
    with pytest.raises(error, match=message):
        fit_penalty(model, tokenizer, rows, labels, penalty, **given)


def test_a_feature_that_says_the_same_everywhere_is_named(model, tokenizer):
    dead = FeaturePenalty([17, 9], of="activation")
    rows = texts()
    labels = ordered(model, rows, [17])
    with torch.no_grad():
        kept, model.saes[0].b_enc.data[9] = float(model.saes[0].b_enc[9]), -1e9
        try:
            with pytest.raises(ValueError, match="Feature 9 has the same activation at every token"):
                fit_penalty(model, tokenizer, rows, labels, dead)
        finally:
            model.saes[0].b_enc.data[9] = kept
