"""The declaration: its JSON form, and errors where a value was typed."""

# pyright: reportArgumentType=false

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Steering
from sae_transformers.modeling import sae_steering
from sae_transformers.modeling.feature_edits import OPS
from tests.tiny import prompt, tiny_model

FULL = Steering(
    [
        FeatureEdit(feature=3, op="add", value=2, unit="norm"),
        FeatureEdit(sae=1, feature="joy", op="ablate"),
        FeatureReweighting(scores=(0.0, 1.5), mode="weight", legacy=True),
    ],
    positions=[(1, None), (-3, -1)],
    keep_error=False,
    reconstruct=(1,),
    balance=True,
)


def test_json_round_trip():
    for steering in (FULL, Steering(), Steering([FeatureEdit(feature=0, value=1.0)], positions="last_prompt")):
        assert Steering.from_dict(steering.to_dict()) == steering
        assert Steering.from_json(steering.to_json()) == steering
        assert Steering.from_dict(json.loads(json.dumps(steering.to_dict()))) == steering
        assert hash(Steering.from_json(steering.to_json())) == hash(steering)


def test_coercion():
    edit = FeatureEdit(feature=3, value=2.0)
    expected = Steering([edit])
    for value in (expected, expected.to_dict(), expected.to_json(), edit, [edit], (edit,)):
        assert Steering.coerce(value) == expected
    for nothing in (None, False, Steering()):
        assert not Steering.coerce(nothing)
    with pytest.raises(TypeError, match="Received: int"):
        Steering.coerce(3)


def test_what_counts_as_steering():
    assert FULL
    assert Steering(reconstruct=(0,))
    assert not Steering(positions="prompt")


def test_every_op_is_explained():
    assert list(OPS) == [
        "add", "scale", "set", "ablate", "erase", "at_least", "at_most", "shrink", "direction", "scale_magnitude",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feature": 1, "op": "clamp", "value": 1.0}, "'set'.*Received: op='clamp'"),
        ({"feature": 1, "value": math.nan}, "finite.*Received: value=nan"),
        ({"feature": 1, "value": math.inf}, "finite.*Received: value=inf"),
        ({"feature": 1, "value": 10**400}, "finite.*Received: value=1000"),
        ({"feature": 1, "value": "2"}, "finite.*Received: value='2'"),
        ({"feature": 1, "value": True}, "finite.*Received: value=True"),
        ({"feature": 1}, "finite.*Received: value=None"),
        ({"value": 1.0}, "Received: feature=None"),
        ({"feature": -1, "value": 1.0}, "Received: feature=-1"),
        ({"feature": 1.0, "value": 1.0}, "Received: feature=1.0"),
        ({"feature": 1, "sae": -1, "value": 1.0}, "Received: sae=-1"),
        ({"feature": 1, "sae": True, "value": 1.0}, "Received: sae=True"),
        ({"feature": 1, "op": "ablate", "value": 1.0}, "takes no value.*Received: value=1.0"),
        ({"feature": 1, "op": "add", "value": 1.0, "unit": "sigma"}, "Received: unit='sigma'"),
        ({"feature": 1, "op": "scale", "value": 1.0, "unit": "max"}, "takes no unit.*Received: unit='max'"),
    ],
)
def test_bad_edits_are_refused_where_they_are_written(values, message):
    with pytest.raises(ValueError, match=message):
        FeatureEdit(**values)
    with pytest.raises(ValueError, match=message):
        Steering.from_dict({"edits": [values]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scores": ()}, "Received: none"),
        ({"scores": (1.0, math.nan)}, r"Received: scores\[1\]=nan"),
        ({"scores": (-1.0,)}, r"Received: scores\[0\]=-1.0"),
        ({"scores": (1.0, "2")}, r"list of numbers.*Received: scores\[1\]='2'"),
        ({"scores": (None,)}, r"list of numbers.*Received: scores\[0\]=None"),
        ({"scores": (10**400,)}, r"list of numbers.*Received: scores\[0\]=1000"),
        ({"scores": (1.0,), "mode": "clamp"}, "Received: mode='clamp'"),
        ({"scores": (1.0,), "legacy": True}, "Received: mode='swap'"),
        ({"scores": (1.0,), "sae": -2}, "Received: sae=-2"),
    ],
)
def test_bad_scores_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FeatureReweighting(**values)


@pytest.mark.parametrize("scores", ["12", b"12", 5, None])
def test_scores_are_a_list_of_numbers(scores):
    with pytest.raises(TypeError, match=f"list of numbers. Received: scores={scores!r}"):
        FeatureReweighting(scores=scores)


def test_scores_may_come_from_any_library():
    given = ([1, 0.5], (1.0, 0.5), torch.tensor([1.0, 0.5]), np.array([1.0, 0.5], dtype=np.float32))
    assert {FeatureReweighting(scores=one).scores for one in given} == {(1.0, 0.5)}


def test_the_hash_is_kept_but_not_in_a_pickle(monkeypatch):
    """Each token of a server looks its plan up; another process hashes texts in another way."""
    steering, hashed = Steering.from_json(FULL.to_json()), []
    monkeypatch.setattr(FeatureEdit, "__hash__", lambda edit: hashed.append(edit) or 0)
    assert {steering: 1}[steering] and hash(steering) and not hashed
    state = pickle.dumps(steering)
    assert b"_hash" not in state
    copies = pickle.loads(state), copy.deepcopy(steering)
    assert len(hashed) == 4  # of two edits each, beside the re-weighting
    assert [one == steering and hash(one) != hash(steering) for one in copies] == [True, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positions": "promt"}, "Received: positions='promt'"),
        ({"positions": [1, 2]}, "Received: positions="),
        ({"positions": [(1, 2.5)]}, "integers.*2.5"),
        ({"positions": [(True, 2)]}, "integers.*True"),
        ({"reconstruct": (-1,)}, "Received: reconstruct"),
        ({"edits": [FeatureReweighting(scores=(1.0,)), FeatureReweighting(scores=(2.0,))]}, "once only"),
    ],
)
def test_bad_steering_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Steering(**values)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"Unknown fields \['position'\] of Steering"):
        Steering.from_dict({"position": "all"})
    with pytest.raises(ValueError, match=r"Unknown fields \['amount'\] of FeatureEdit"):
        Steering.from_dict({"edits": [{"feature": 1, "amount": 2.0}]})
    with pytest.raises(TypeError, match="Received: 7"):
        Steering([7])
    with pytest.raises(TypeError, match=r"Received: \[1\]"):
        Steering.from_dict([1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (FeatureEdit(feature=64, value=1.0), r"\[0, 64\).*Received: feature=64"),
        (FeatureEdit(feature="joy", value=1.0), "'anger'.*Received: feature='joy'"),
        (FeatureEdit(sae=1, feature=0, value=1.0), r"1 SAE\(s\).*Received: sae=1"),
        (FeatureReweighting(scores=(1.0, 2.0)), "64 latents. Received: 2"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_it_runs(edit, message):
    model = tiny_model(concepts={"anger": 5})
    for attempt in (
        lambda: model.prepare_steering([edit]),
        lambda: model(prompt(), steering=[edit]),
        lambda: model.generate(prompt(), steering=[edit]),
        lambda: setattr(model, "steering", Steering([edit])),
        lambda: model.steered([edit]).__enter__(),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert not model.steering


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("positions", ["last_prompt", [(2, 4)], [(50, 60)]])
def test_only_steered_tokens_are_encoded(activation, positions, monkeypatch):
    model = tiny_model(activation=activation)
    steering = Steering([FeatureEdit(0, i, "at_least", 1.0) for i in range(9)], positions=positions)
    seen = []
    keep = sae_steering.steer
    monkeypatch.setattr(sae_steering, "steer", lambda sae, x, *rest: seen.append(x.shape[1]) or keep(sae, x, *rest))
    ids = prompt(2, 12)
    with torch.no_grad():
        logits = model(ids, steering=steering).logits
        assert seen == {"last_prompt": [1], ((2, 4),): [2], ((50, 60),): []}[steering.positions]
        monkeypatch.setattr("sae_transformers.modeling.call_record.CallRequest.steered_columns", lambda self: None)
        torch.testing.assert_close(model(ids, steering=steering).logits, logits, rtol=1e-6, atol=1e-6)
        plain = model(ids, steering=False).logits
    assert torch.equal(plain, logits) == (positions == [(50, 60)])
