"""Steering compiled for a model: tables of values, what must be encoded, and which columns are steered."""

import itertools

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.modeling.steered_tokens import steering_rows_for
from tests.invariants.naive import steered_columns
from tests.tiny import prompt, tiny_model


def edit(op: str, feature: int = 3, value: float | None = 1.0, unit: str = "absolute") -> FeatureEdit:
    return FeatureEdit(feature=feature, op=op, value=value, unit=unit)


def test_only_what_must_be_encoded_is_read():
    model = tiny_model()
    plan = model.prepare_steering([edit("add", 3), edit("direction", 5), edit("set", 7), edit("add", 7)]).saes[0]
    assert (plan.read.tolist(), plan.blind.tolist(), plan.direct.tolist()) == ([7], [3], [5])
    assert len(plan.stages) == 2
    assert plan.replace == "none"
    plan = model.prepare_steering([edit("add", 3, unit="norm")]).saes[0]
    assert (plan.read.tolist(), plan.blind.tolist(), plan.direct.tolist()) == ([], [], [3])


def test_concepts_are_latents():
    model = tiny_model(concepts={"joy": 9})
    plan = model.prepare_steering([FeatureEdit(feature="joy", op="set", value=2.0)])
    assert plan.saes[0].read.tolist() == [9]


def test_equal_steering_is_compiled_once():
    model = tiny_model()
    first = model.prepare_steering([edit("set")])
    assert model.prepare_steering([edit("set")]) is first
    assert model.prepare_steering(first) is first
    assert model.prepare_steering([edit("set", value=2.0)]) is not first
    assert model.prepare_steering([Steering([edit("set")]), None]) is not first


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [
        ("add", 2.0, [1.0, 2.0, 5.0]),
        ("scale", -2.0, [2.0, 0.0, -6.0]),
        ("set", 0.5, [0.5, 0.5, 0.5]),
        ("ablate", None, [0.0, 0.0, 0.0]),
        ("at_least", 1.0, [1.0, 1.0, 3.0]),
        ("at_most", 1.0, [-1.0, 0.0, 1.0]),
        ("shrink", 2.0, [0.0, 0.0, 1.0]),
    ],
)
def test_stages_are_the_ops(op, value, expected):
    model = tiny_model()
    # A second op keeps `add` among the latents that are read.
    plan = model.prepare_steering([edit(op, 3, value), edit("scale", 3, 1.0)]).saes[0]
    latents = torch.tensor([-1.0, 0.0, 3.0]).view(1, 3, 1)
    for stage in plan.stages:
        latents = stage.apply(latents, None, None, None)
    assert latents.flatten().tolist() == expected


def test_units_multiply_the_value():
    model = tiny_model()
    plan = model.prepare_steering([edit("set", 3, 2.0, "max"), edit("set", 5, 3.0, "norm"), edit("set", 7, 4.0)])
    stage = plan.saes[0].stages[0]
    maxima, norms = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([[[5.0, 6.0, 7.0], [8.0, 9.0, 1.0]]])
    changed = stage.apply(torch.zeros(1, 2, 3), None, maxima, norms)
    assert changed.tolist() == [[[20.0, 18.0, 4.0], [20.0, 27.0, 4.0]]]


def test_the_typical_maximum_must_be_known():
    model = tiny_model()
    model.saes[0].feature_max[3] = 0.0
    with pytest.raises(ValueError, match=r"feature_max.*unit='max'"):
        model.prepare_steering([edit("set", 3, 1.0, "max")])


def test_position_masks_are_those_of_the_definition():
    """Every pair of bounds, prompts of three lengths, columns seen in one piece and one by one."""
    model = tiny_model()
    bounds = [None, 0, 2, 5, 11, -1, -3, -9]
    cases = ["all", "prompt", "generated", "last_prompt", *([pair] for pair in itertools.product(bounds, bounds))]
    places = [(0, 9), (3, 9), (8, 9)]
    rows = torch.tensor([[0, first, end] for first, end in places])
    for positions in cases:
        plan = model.prepare_steering(Steering([edit("set")], positions=positions))
        expected = torch.tensor([steered_columns(plan_positions(positions), f, e, 14) for f, e in places])
        whole = plan.position_mask(torch.arange(14), rows)
        if whole is None:
            assert positions == "all"
            continue
        assert torch.equal(whole, expected), positions
        pieces = [plan.position_mask(torch.arange(c, c + 1), rows) for c in range(14)]
        assert torch.equal(torch.cat(pieces, 1), expected), positions
        if plan.ends_with_prompt:
            assert not expected[:, 9:].any(), positions


def plan_positions(positions):
    return positions if isinstance(positions, str) else [tuple(p) for p in positions]


def test_rows_know_their_place():
    ids = prompt(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert steering_rows_for(ids, mask, 0, None).tolist() == [[0, 0, 6], [0, 2, 6], [0, 0, 4]]
    assert steering_rows_for(ids, mask, 0, 6, count=3).tolist() == [[0, 0, 6], [1, 2, 6], [2, 0, 6]]
    assert steering_rows_for(ids, None, 4, None).tolist() == [[0, 0, 4]] * 3
    embeddings = torch.zeros(2, 5, 8)
    assert steering_rows_for(embeddings, None, 0, None, count=2).tolist() == [[0, 0, 5], [1, 0, 5]]
    with pytest.raises(ValueError, match="3 rows. Received: 2 steerings"):
        steering_rows_for(ids, None, 0, None, count=2)


def test_rows_that_cannot_go_together_are_refused():
    model = tiny_model()
    balanced = Steering([edit("set")], balance=True)
    with pytest.raises(ValueError, match="same for all rows"):
        model.prepare_steering([balanced, Steering([edit("set")])])
    with pytest.raises(ValueError, match="only edit of its latent. Received: several of feature 3"):
        model.prepare_steering([edit("scale_magnitude"), edit("add")])
    plan = model.prepare_steering([Steering([edit("scale_magnitude")]), Steering([edit("add"), edit("scale")])])
    assert plan.count == 2
