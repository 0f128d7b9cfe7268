"""Methods over strengths, and a steering that is scaled."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Steering
from sae_transformers.evaluation.steering_methods.over_strengths import (
    STRENGTHS,
    latent_method,
    prompt_methods,
    scaled_method,
    scaled_steering,
)
from tests.tiny import prompt, tiny_model


def test_a_latent_over_strengths() -> None:
    method = latent_method(3, [-0.5, 0.25], sae=1, positions="generated")
    assert list(method.settings) == ["-0.5", "0.25"] and method.instructions is None
    assert method.steerings[0] == Steering([FeatureEdit(1, 3, "direction", -0.5, "norm")], positions="generated")
    factors = latent_method(3, [-100.0, 0.0], op="scale", keep_error=False).steerings
    assert [one.feature_edits[0].value for one in factors] == [-100.0, 0.0]
    assert all(not one.keep_error and one.feature_edits[0].unit == "absolute" for one in factors)
    assert len(latent_method("toxicity").settings) == len(STRENGTHS)


@pytest.mark.parametrize("op", ["direction", "add", "scale", "ablate"])
def test_a_scaled_steering_changes_the_hidden_state_in_proportion(op: str) -> None:
    model = tiny_model(dtype=torch.float64).eval()
    whole = Steering([FeatureEdit(0, f, op, None if op == "ablate" else 1.7) for f in range(64)])
    ids, outputs = prompt(), {}
    handle = model.lm.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    for factor in (None, 0.0, 1.0, 2.0, -1.0):
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            model(ids, steering=False if factor is None else scaled_steering(whole, factor))
        outputs[factor] = seen[0]
    with torch.no_grad():
        seen = []
        model(ids, steering=whole)
    handle.remove()
    torch.testing.assert_close(outputs[1.0], seen[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs[0.0], outputs[None], rtol=1e-12, atol=1e-12)
    for factor in (2.0, -1.0):
        change = outputs[factor] - outputs[None]
        torch.testing.assert_close(change, factor * (outputs[1.0] - outputs[None]), rtol=1e-9, atol=1e-9)
    assert float((outputs[1.0] - outputs[None]).abs().max()) > 0.01


def test_levels_are_multiplied() -> None:
    edits = [FeatureEdit(0, 1, "set", 2.0, "norm"), FeatureEdit(0, 2, "at_least", 3.0), FeatureEdit(0, 4, "shrink", 1)]
    found = scaled_method(Steering(edits, positions="prompt", keep_error=False), [0.5])
    assert list(found.settings) == ["x0.5"]
    assert [edit.value for edit in found.steerings[0].feature_edits] == [1.0, 1.5, 0.5]
    assert found.steerings[0].positions == "prompt" and not found.steerings[0].keep_error


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="0 edits of latents, 0 of which erase, 0 re-weightings"):
        scaled_steering(Steering(), 2.0)
    with pytest.raises(ValueError, match="1 re-weightings"):
        scaled_steering(Steering([FeatureReweighting(0, [1.0] * 4)]), 2.0)
    with pytest.raises(ValueError, match="1 of which erase"):
        scaled_steering(Steering([FeatureEdit(feature=1, op="erase")]), 2.0)


def test_instructions_stand_before_the_prompts() -> None:
    both = prompt_methods(["a", "b"], " Be kind. ", "Be rude.")
    assert [list(one.settings) for one in both] == [["for"], ["against"]]
    assert both[0].instructions == ["Be kind.\n\na", "Be kind.\n\nb"] and both[0].steerings == [None]
    (one,) = prompt_methods(["a"], "", "Be rude.")
    assert list(one.settings) == ["against"]
    with pytest.raises(ValueError, match="Received: ' ' and ''"):
        prompt_methods(["a"], " ")
