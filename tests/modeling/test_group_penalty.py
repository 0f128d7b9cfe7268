"""`GroupPenalty` as a description: what it takes, its JSON, and what a classifier makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from sae_transformers import GroupPenalty, LossWeights, SaeConfig, SaeForCausalLM, SaeForSequenceClassification
from sae_transformers.modeling.group_penalty import group_from, groups_from
from tests.tiny import prompt, tiny_base, tiny_sae

NAMED = {"concepts": {"anger": 3}, "feature_names": {"9": "rivers"}}
LABELS: dict[str, Any] = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
HEAD = {"sae": 0}


def classifier(groups: Any, **options: Any) -> Any:
    config = tiny_base().config
    config.id2label, config.label2id = LABELS["id2label"], LABELS["label2id"]
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config)
    saes = [tiny_sae(layer=0, **NAMED), tiny_sae(seed=2, layer=1)]
    return SaeForSequenceClassification.from_base(base, saes, group_penalties=groups, **options)


@pytest.mark.parametrize(
    ("group", "written"),
    [
        (GroupPenalty("anger"), {"features": ["anger"]}),
        (
            GroupPenalty([1, "anger"], weight=3, name="identity"),
            {"features": [1, "anger"], "weight": 3.0, "name": "identity"},
        ),
        (
            GroupPenalty([7], sae=1, of="decoder", power=2, labels=["good", 0], skip_first=0),
            {"features": [7], "sae": 1, "of": "decoder", "power": 2, "labels": ["good", 0], "skip_first": 0},
        ),
    ],
)
def test_json_gives_an_equal_group_back(group: GroupPenalty, written: dict) -> None:
    assert group.to_dict() == written
    assert group_from(json.loads(json.dumps(written))) == group
    assert hash(group_from(written)) == hash(group)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"features": []}, r"at least one of `features`. Received: features=\[\]"),
        ({"features": None}, "features=None"),
        ({"features": {3: 1.0}}, r"features=\{3: 1.0\}"),
        ({"features": -1}, "feature=-1"),
        ({"features": [True]}, r"features=\[True\]"),
        ({"features": [3, 3]}, r"one is there twice. Received: features=\[3, 3\]"),
        ({"features": [3, 0.5]}, "0.5 is neither"),
        ({"features": 3, "weight": float("nan")}, "weight=nan"),
        ({"features": 3, "weight": -1}, "weight=-1.0"),
        ({"features": 3, "weight": True}, "weight=True"),
        ({"features": 3, "sae": -1}, "sae=-1"),
        ({"features": 3, "of": "logit"}, "'contribution', 'affine', 'encoder', 'decoder'. Received: of='logit'"),
        ({"features": 3, "power": 3}, "power=3"),
        ({"features": 3, "labels": []}, r"labels=\[\]"),
        ({"features": 3, "skip_first": -1}, "skip_first=-1"),
        ({"features": 3, "name": ""}, "name=''"),
        ({"features": 3, "wieght": 1}, "wieght"),
    ],
)
def test_bad_values_are_told_where_they_are_given(values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        group_from(values)


@pytest.mark.parametrize("value", ["anger", [3], 3, {"weight": 1.0}])
def test_what_is_no_group_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected a GroupPenalty or its dict|must be a list of GroupPenalty"):
        groups_from(value)


@pytest.mark.parametrize(
    ("groups", "head", "told"),
    [
        (GroupPenalty(3, sae=2), None, "has 2 SAE.*sae=2"),
        (GroupPenalty(64), None, "feature=64"),
        (GroupPenalty("angre"), None, "'anger'.*feature='angre'"),
        (GroupPenalty(["anger", 3]), None, "one latent"),
        (GroupPenalty(3, labels="great"), None, r"Labels are bad, fine, good \(0 to 2\). Received: labels='great'"),
        (GroupPenalty(3, labels=[3]), None, "labels=3"),
        (GroupPenalty(3, labels=["bad", 0]), None, "Two of the labels are one"),
        ([GroupPenalty(3, name="a"), GroupPenalty(4, name="a")], None, "group_a, group_a"),
        (GroupPenalty(3, of="decoder"), None, "Expected of='contribution'.*of='decoder'"),
        (GroupPenalty(3, sae=1, of="decoder"), HEAD, "reads the state of SAE 0.*sae=1"),
        (GroupPenalty(3, sae=1), HEAD, "reads at layers.0.resid_post, before SAE 1 at layers.1.resid_post"),
        (
            GroupPenalty(3, of="affine", labels="good"),
            {"sae": 0, "hidden_size": 5},
            r"Expected no `labels`.*hidden_size=5",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused(groups: Any, head: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        classifier(groups, feature_head=head)
    model = classifier(None, feature_head=head)
    with pytest.raises(ValueError, match=told):
        model.group_penalties = groups
    assert model.group_penalties == () and model.config.group_penalties == []


def test_a_language_model_has_no_scores_of_texts() -> None:
    with pytest.raises(ValueError, match="SaeForCausalLM has no scores of texts.*`feature_penalties`"):
        SaeForCausalLM.from_base("no such base", [tiny_sae(layer=1)], group_penalties=GroupPenalty(3))


@pytest.mark.parametrize("scope", ["full", "sae"])
def test_it_is_part_of_the_config_and_comes_back_with_the_model(scope: str, tmp_path: Any) -> None:
    given = [GroupPenalty(["anger", 7], weight=0.5, name="calm"), GroupPenalty("rivers", labels="good", power=2)]
    model = classifier(given, weights_scope=scope)
    model.config.base_model_name_or_path = "a base"
    assert model.group_penalties == tuple(given)
    stored = SaeConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))).group_penalties
    assert stored == [one.to_dict() for one in given]
    model.save_pretrained(tmp_path / "model")
    place = {} if scope == "full" else {"base_model": model.lm}
    loaded = SaeForSequenceClassification.from_pretrained(tmp_path / "model", **place)
    assert loaded.group_penalties == tuple(given)
    options = {"labels": torch.tensor([0, 2])}
    expected, found = (m.eval()(prompt(), **options) for m in (model, loaded))
    assert set(found.sae_losses) == {"group_calm", "group_1"}
    for name, value in expected.sae_losses.items():
        torch.testing.assert_close(found.sae_losses[name], value, rtol=0, atol=0)
    loaded.config.group_penalties = [GroupPenalty(5).to_dict()]  # set there: the model follows
    assert loaded.group_penalties == (GroupPenalty(5),)
    loaded.group_penalties = None
    assert loaded.group_penalties == () and loaded(prompt(), **options).sae_losses is None


def test_a_bad_config_is_refused_where_it_is_read() -> None:
    config = classifier(GroupPenalty(3)).config.to_dict()
    config["group_penalties"][0]["weight"] = "much"
    with pytest.raises(ValueError, match="weight='much'"):
        SaeConfig.from_dict(config)


def test_saes_are_frozen_unless_a_loss_of_theirs_trains_them() -> None:
    assert not any(p.requires_grad for p in classifier(GroupPenalty(3)).saes.parameters())
    kept = classifier(GroupPenalty(3), loss_weights=LossWeights(reconstruction=1.0))
    assert all(p.requires_grad for p in kept.saes.parameters())
    later = classifier(None)
    assert all(p.requires_grad for p in later.saes.parameters())
    later.group_penalties = GroupPenalty(3)
    assert not any(p.requires_grad for p in later.saes.parameters())
