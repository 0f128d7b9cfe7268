"""`FeaturePenalty` as a description: what it takes, its JSON, and what a model makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sae_transformers import (
    FeaturePenalty,
    LossWeights,
    SaeConfig,
    SaeForCausalLM,
    SaeForSequenceClassification,
    SaeModel,
)
from sae_transformers.modeling.feature_penalty import bind_penalties, penalties_from, penalty_from
from tests.tiny import prompt, tiny_base, tiny_sae

NAMED = {"concepts": {"anger": 3}, "feature_names": {"9": "rivers"}, "layer": 1}


def model_with(penalties: Any, **options: Any) -> Any:
    return SaeForCausalLM.from_base(tiny_base(), [tiny_sae(**NAMED)], feature_penalties=penalties, **options)


@pytest.mark.parametrize(
    ("penalty", "written"),
    [
        (FeaturePenalty("anger"), {"features": ["anger"]}),
        (FeaturePenalty(7, of="share", over="all"), {"features": [7], "of": "share", "over": "all"}),
        (
            FeaturePenalty({"anger": 2, 7: 0.5}, weight=3, margin=[1, -2.5]),
            {"features": [["anger", 2.0], [7, 0.5]], "weight": 3.0, "margin": [1.0, -2.5]},
        ),
        (
            FeaturePenalty([1, 2], sae=1, goal="reference", power=2, skip_first=0, name="calm"),
            {"features": [1, 2], "sae": 1, "goal": "reference", "power": 2, "skip_first": 0, "name": "calm"},
        ),
    ],
)
def test_json_gives_an_equal_penalty_back(penalty: FeaturePenalty, written: dict) -> None:
    assert penalty.to_dict() == written
    assert penalty_from(json.loads(json.dumps(written))) == penalty
    assert hash(penalty_from(written)) == hash(penalty)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"features": []}, r"features=\[\]"),
        ({"features": {}}, r"features=\{\}"),
        ({"features": None}, "features=None"),
        ({"features": -1}, "feature=-1"),
        ({"features": [True]}, "feature=True"),
        ({"features": [3, 3]}, r"features=\[3, 3\]"),
        ({"features": {3: 0.0}}, r"features\[3\]=0.0"),
        ({"features": {3: float("nan")}}, "nan"),
        ({"features": 3, "weight": float("nan")}, "weight=nan"),
        ({"features": 3, "weight": -1}, "weight=-1.0"),
        ({"features": 3, "sae": -1}, "sae=-1"),
        ({"features": 3, "of": "logit"}, "of='logit'"),
        ({"features": 3, "over": "prompt"}, "over='prompt'"),
        ({"features": 3, "goal": "up"}, "goal='up'"),
        ({"features": 3, "margin": float("inf")}, "margin=inf"),
        ({"features": 3, "margin": [1, 2]}, "2 numbers"),
        ({"features": 3, "margin": 1.0, "goal": "zero"}, "goal='zero'"),
        ({"features": 3, "power": 3}, "power=3"),
        ({"features": 3, "skip_first": -1}, "skip_first=-1"),
        ({"features": 3, "name": ""}, "name=''"),
        ({"features": 3, "wieght": 1}, "wieght"),
    ],
)
def test_bad_values_are_told_where_they_are_given(values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        penalty_from(values)


@pytest.mark.parametrize("value", ["anger", [3], 3, {"weight": 1.0}])
def test_what_is_no_penalty_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected a FeaturePenalty or its dict|must be a list of FeaturePenalty"):
        penalties_from(value)


@pytest.mark.parametrize(
    ("penalties", "told"),
    [
        (FeaturePenalty(3, sae=1), "has 1 SAE.*sae=1"),
        (FeaturePenalty(64), "feature=64"),
        (FeaturePenalty("angre"), "'anger'.*feature='angre'"),
        (FeaturePenalty(["anger", 3]), "one latent"),
        ([FeaturePenalty(3, name="a"), FeaturePenalty(4, name="a")], "penalty_a, penalty_a"),
    ],
)
def test_what_the_model_does_not_have_is_refused(penalties: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        model_with(penalties)
    model = model_with(None)
    with pytest.raises(ValueError, match=told):
        model.feature_penalties = penalties
    assert model.feature_penalties == () and model.config.feature_penalties == []


def test_heads_know_which_tokens_they_have() -> None:
    base, sae = tiny_base(), tiny_sae(**NAMED)
    with pytest.raises(ValueError, match="SaeModel has no loss"):
        SaeModel.from_base(base.model, [sae], feature_penalties=FeaturePenalty(3))
    with pytest.raises(ValueError, match="'all', 'mask'.*over='answer'"):
        SaeForSequenceClassification.from_base("no such base", [sae], feature_penalties=FeaturePenalty(3))


def test_it_is_part_of_the_config_and_comes_back_with_the_model(tmp_path: Any) -> None:
    given = [FeaturePenalty({"anger": 2, 7: 1}, weight=0.5, name="calm"), FeaturePenalty("rivers", over="mask")]
    model = model_with(given, weights_scope="full")
    assert model.feature_penalties == tuple(given)
    assert SaeConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))).feature_penalties == [
        one.to_dict() for one in given
    ]
    model.save_pretrained(tmp_path)
    loaded = SaeForCausalLM.from_pretrained(tmp_path)
    assert loaded.feature_penalties == tuple(given)
    ids = prompt()
    options = {"labels": ids, "penalty_mask": torch.ones_like(ids)}
    expected, found = (m.eval()(ids, **options) for m in (model, loaded))
    assert set(found.sae_losses) == {"penalty_calm", "penalty_1"}
    for name, value in expected.sae_losses.items():
        torch.testing.assert_close(found.sae_losses[name], value, rtol=0, atol=0)
    loaded.config.feature_penalties = [FeaturePenalty(5).to_dict()]  # set there: the model follows
    assert loaded.feature_penalties == (FeaturePenalty(5),)
    loaded.feature_penalties = None
    assert loaded.feature_penalties == () and loaded(ids, labels=ids).sae_losses is None


def test_a_bad_config_is_refused_where_it_is_read() -> None:
    config = model_with(FeaturePenalty(3)).config.to_dict()
    config["feature_penalties"][0]["weight"] = "much"
    with pytest.raises(ValueError, match="weight='much'"):
        SaeConfig.from_dict(config)


def test_saes_are_frozen_unless_a_loss_of_theirs_trains_them() -> None:
    assert not any(p.requires_grad for p in model_with(FeaturePenalty(3)).saes.parameters())
    kept = model_with(FeaturePenalty(3), loss_weights=LossWeights(reconstruction=1.0))
    assert all(p.requires_grad for p in kept.saes.parameters())
    later = model_with(None)
    assert all(p.requires_grad for p in later.saes.parameters())
    later.feature_penalties = FeaturePenalty(3)
    assert not any(p.requires_grad for p in later.saes.parameters())


def test_margins_and_weights_are_those_of_their_features() -> None:
    configs = [tiny_sae(**NAMED).config]
    (bound,) = bind_penalties([FeaturePenalty({"rivers": 1, "anger": 3}, margin=[0.5, -1])], configs)
    assert (bound.features, bound.weights, bound.margins) == ((9, 3), (0.25, 0.75), (0.5, -1.0))


def test_a_batch_without_labels_is_no_division_by_zero() -> None:
    """Masked tokens of unlabelled rows are penalised where chance puts such rows alone into a batch, too."""
    model = model_with(FeaturePenalty("anger", over="mask", name="anger"), weights_scope="full").train()
    ids = prompt(2, 6)
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    out = model(input_ids=ids, labels=labels, penalty_mask=mask, num_items_in_batch=torch.tensor(0))
    out.loss.backward()
    with torch.no_grad():
        hidden = model.lm.model(ids, output_hidden_states=True).hidden_states[2]
        costs = model.saes[0].encode_pre_acts(hidden)[:, 1:, 3].relu()
    torch.testing.assert_close(out.loss, costs.mean(), rtol=1e-5, atol=1e-6)
    assert costs.mean() > 1e-3
    gradients = [p.grad for p in model.lm.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-6
