"""The steering of a request, as it reaches the engine."""

from __future__ import annotations

from sae_transformers import FeatureEdit, Steering
from sae_transformers.serving.steering_field import read_steering


def test_a_receipt_is_left_at_the_door() -> None:
    steering = Steering([FeatureEdit(feature=3, op="add", value=2.0)], receipt={"note": "x" * 100_000})
    seen: list[Steering] = []
    found = read_steering(steering.to_dict(), [64], seen.append)
    assert found == steering and found.receipt is None and seen == [found]
