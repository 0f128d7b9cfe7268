"""Vectors as SAEs: what is added to a state, and what is put in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.latents.vector_saes import constant_sae, direction_sae
from tests.tiny import prompt, tiny_base, tiny_model, tiny_sae


def test_steering_along_any_direction() -> None:
    direction = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    sae = tiny_sae(layer=1, site="resid_post")
    model: Any = SaeForCausalLM.from_base(tiny_base(), saes=[sae, direction_sae(direction, sae.config)]).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    plain = model(input_ids=ids, output_sae_inputs=True).sae_inputs[1]
    edit = Steering([FeatureEdit(1, 1, "direction", 0.5, "norm")])
    steered = model(input_ids=ids, steering=edit).logits
    handle = model.lm.model.layers[1].register_forward_hook(
        lambda module, args, out: out + 0.5 * out.norm(dim=-1, keepdim=True) * direction[1] / direction[1].norm()
    )
    expected = model.lm(input_ids=ids).logits
    handle.remove()
    assert plain.shape == (1, 4, 32) and torch.allclose(steered, expected, atol=1e-5)
    with pytest.raises(ValueError, match="finite and not zero"):
        direction_sae(torch.zeros(1, 32), sae.config)
    with pytest.raises(ValueError, match=r"\(1, 16\)"):
        direction_sae(torch.ones(1, 16), sae.config)


def test_a_state_in_the_place_of_the_last_prompt_tokens() -> None:
    state = torch.randn(32, generator=torch.Generator().manual_seed(0))
    model = tiny_model(saes=[constant_sae(state, tiny_sae(layer=1).config)])
    states: list[torch.Tensor] = []
    model.lm.model.layers[1].register_forward_hook(lambda module, args, out: states.append(out))
    with torch.no_grad():
        model(prompt(2, 5), steering=False)
        model(prompt(2, 5), steering=Steering(reconstruct=(0,), positions="last_prompt"))
    torch.testing.assert_close(states[1][:, -1], state.expand(2, -1))
    assert torch.equal(states[1][:, :-1], states[0][:, :-1])
    with pytest.raises(ValueError, match=r"\(32,\). Received: \(1, 32\)"):
        constant_sae(torch.zeros(1, 32), tiny_sae(layer=1).config)
