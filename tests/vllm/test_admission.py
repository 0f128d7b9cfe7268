"""The door: what a request asks is checked and resolved, before it is anybody else's trouble."""

import json

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.serving.errors import RequestError
from sae_transformers.vllm.admission import Admission
from tests.tiny import tiny_sae

SET = Steering([FeatureEdit(feature=5, op="set", value=8.0)])


def admission(default: Steering | None = None, maxima: bool = True) -> Admission:
    saes = [tiny_sae(activation="jumprelu", layer=1, concepts={"sea": 9}), tiny_sae(activation="gated", layer=1)]
    known = {0: saes[0].feature_max, 1: torch.zeros(64)} if maxima else {}
    return Admission([sae.config for sae in saes], known, default or Steering())


@pytest.mark.parametrize("given", [SET, SET.to_dict(), SET.to_json(), SET.to_dict()["edits"]])
def test_every_form_is_resolved_to_one(given):
    assert admission().resolve({"steering": given, "other": 3}) == {"steering": SET.to_dict(), "other": 3}


def test_the_default_is_of_requests_that_bring_none():
    door = admission(default=SET)
    assert door.resolve(None) == {"steering": SET.to_dict()}
    assert door.resolve({"steering": None}) == {"steering": SET.to_dict()}
    for none in (False, "false", [], {"edits": []}):
        assert door.resolve({"steering": none}) == {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"edits": [{"feature": 999, "op": "set", "value": 1.0}]}, "an integer in"),
        ({"edits": [{"feature": "lake", "op": "set", "value": 1.0}]}, "lake"),
        ({"edits": [{"feature": 3, "op": "zap", "value": 1.0}]}, "`op` must be one of"),
        ({"edits": [{"feature": 3, "sae": 2, "op": "set", "value": 1.0}]}, "The model has 2 SAE"),
        ({"edits": [{"feature": 3, "sae": 1, "op": "set", "value": 1.0, "unit": "max"}]}, "typical maximum"),
        (
            {"edits": [{"feature": 3, "sae": 1, "op": "scale_magnitude", "value": 1.0}]},
            "one pre-activation per latent",
        ),
        ({"edits": [{"feature": f, "op": "set", "value": 1.0} for f in range(64)], "balance": True}, "balance"),
        ({"edits": [{"feature": 3, "op": "set", "value": 1.0, "when": "active"}]}, "not supported on vLLM"),
        (
            {"edits": [{"feature": 3, "op": "ablate"}], "exclude_tokens": [1]},
            "`exclude_tokens` is not supported on vLLM",
        ),
        ({"edits": [{"feature": 3, "op": "ablate", "strength": {"first": 2}}]}, "`strength` is not supported on vLLM"),
        ({"editz": []}, "Unknown fields"),
        ("{bro", "must be JSON"),
        (5, "must be an object"),
        ("5", "must be an object"),
        ({"edits": [{"feature": 3, "op": "set", "value": 1.0}] * 17}, "At most 16 edits of one feature"),
        ({"reconstruct": [0, 1, 0]}, "At most 2 SAEs"),
    ],
)
def test_bad_steering(given, told):
    with pytest.raises(RequestError, match="steering") as refused:
        admission().resolve({"steering": given})
    assert told in refused.value.message
    assert refused.value.param == "steering"


@pytest.mark.parametrize(
    "reading",
    ["x", {"key": "k"}, {"key": "k", "sae": 5, "feature": 1}, {"key": "k", "sae": 0, "feature": 99},
     {"key": 7, "sae": 0, "feature": 1}, {"key": "k", "sae": 0, "feature": "sea"}],
)  # fmt: skip
def test_readings_are_for_our_endpoint(reading):
    with pytest.raises(RequestError, match="/v1/detect"):
        admission().resolve({"sae_read": reading})


def test_what_is_resolved_is_plain():
    resolved = admission().resolve({"steering": Steering(SET.edits, positions=[(1, None)])})
    assert json.loads(json.dumps(resolved)) == resolved


def test_a_bad_default_is_told_at_start():
    with pytest.raises(ValueError, match="an integer in"):
        admission(default=Steering([FeatureEdit(feature=640, op="set", value=8.0)]))
