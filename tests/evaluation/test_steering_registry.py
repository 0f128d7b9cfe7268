"""The methods that a steering suite compares: what is fitted, and what is put into the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.steering_methods import DiffMean, Latents, Prompting, ScaledSteering, prepare_methods
from sae_transformers.evaluation.steering_methods.directions import diffmean_direction, with_direction
from sae_transformers.evaluation.steering_methods.over_strengths import latent_method
from sae_transformers.latents.diffmean import fit_diffmean
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import prompt, tiny_model, tiny_sae

WITH, WITHOUT = word_texts(5, seed=1), word_texts(7, seed=2)


@pytest.fixture
def model() -> Any:
    return tiny_model(concepts={"joy": 4}).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(begins=True)


def test_the_direction_is_the_difference_of_means_of_texts(model: Any, tokenizer: Any) -> None:
    model.steering = Steering([FeatureEdit(0, 4, "add", 9.0)])  # must not be read along
    found = diffmean_direction(model, tokenizer, WITH, WITHOUT, max_length=8, batch_size=3)
    means = []
    for text in [*WITH, *WITHOUT]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:8]])
        with torch.no_grad():
            hidden = model.lm(ids, output_hidden_states=True).hidden_states[2]  # after the second block
        means.append(hidden[0, 1:].mean(0))
    labels = torch.tensor([1] * 5 + [0] * 7)
    torch.testing.assert_close(found, fit_diffmean(torch.stack(means), labels), rtol=1e-4, atol=1e-5)


def test_the_model_with_a_direction(model: Any) -> None:
    default = Steering([FeatureEdit(0, 4, "add", 1.0)])
    model.steering = default
    ids, direction = prompt(), torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids, steering=False).logits
        as_default = model(ids).logits
    made, number = with_direction(model, direction)
    assert number == 1 and made.steering == default and not made.training
    with torch.no_grad():
        assert torch.equal(made(ids, steering=False).logits, before)
        assert torch.equal(made(ids).logits, as_default)
        seen: list[torch.Tensor] = []
        handle = made.lm.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
        for way in (False, latent_method(0, [0.5], sae=1).steerings[0]):
            made(ids, steering=way)
        handle.remove()
    change = seen[1] - seen[0]
    expected = 0.5 * seen[0].norm(dim=-1, keepdim=True) * direction / direction.norm()
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_methods_by_what_is_given(model: Any, tokenizer: Any) -> None:
    steering = Steering([FeatureEdit(0, 2, "add", 3.0)])
    strengths, positions = [-1.0, 1.0], [(1, None)]
    makers = [
        Latents([(0, "joy")], strengths, positions=positions), ScaledSteering(steering, [2.0]),
        DiffMean(WITH, WITHOUT, strengths, positions=positions), Prompting("w1", "w2"),
    ]  # fmt: skip
    found = prepare_methods(model, tokenizer, ["w5", "w6"], makers)
    made, methods, facts = found.model, found.methods, found.facts
    assert list(methods) == ["latent joy", "steering", "diffmean", "prompt"]
    diffmean: Any = methods["diffmean"]
    assert diffmean.steerings[1] == Steering([FeatureEdit(1, 0, "direction", 1.0, "norm")], positions=[(1, None)])
    assert methods["steering"].steerings[0].feature_edits[0].value == 6.0  # pyright: ignore
    assert [list(one.settings) for one in methods["prompt"]] == [["for"], ["against"]]  # pyright: ignore
    fitted = facts["diffmean"]
    assert (fitted["texts_with"], fitted["texts_without"]) == (5, 7)
    rows = made.saes[0].W_dec[4].detach(), made.saes[1].W_dec[0].detach()
    assert fitted["cosine_with_latent"] == pytest.approx(float(torch.cosine_similarity(*rows, dim=0)), abs=1e-5)
    assert len(fitted["texts_sha256"]) == 64
    assert facts["instructions"] == {"more": "w1", "less": "w2"}
    found = prepare_methods(made, tokenizer, ["w5"], [Latents([(0, 3)], [-100.0], op="scale")])
    assert found.model is made and list(found.methods) == ["latent 3"] and found.facts == {}


def test_what_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="none of them"):
        prepare_methods(model, tokenizer, ["w5"], [])
    with pytest.raises(ValueError, match="999"):
        prepare_methods(model, tokenizer, ["w5"], [Latents([(0, 999)])])
    with pytest.raises(ValueError, match="5 with, 0 without"):
        diffmean_direction(model, tokenizer, WITH, [])
    with pytest.raises(ValueError, match="1 shorter ones"):
        diffmean_direction(model, word_tokenizer(), ["w1 w2"], ["w3"])
    transcoder = tiny_sae(layer=1, site="mlp_in", hook_out="layers.1.mlp_out")
    other = tiny_model(saes=[transcoder]).eval()
    with pytest.raises(ValueError, match="reads .* and writes"):
        diffmean_direction(other, tokenizer, WITH, WITHOUT)
