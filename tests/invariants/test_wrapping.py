"""Putting SAEs into a base changes neither."""

from __future__ import annotations

import torch

from sae_transformers import SaeForCausalLM
from tests.tiny import prompt, tiny_base, tiny_sae


def test_weights_are_kept():
    base, saes = tiny_base(), [tiny_sae(layer=0), tiny_sae(seed=2, activation="jumprelu", layer=1, site="mlp_out")]
    before = [{n: t.clone() for n, t in module.state_dict().items()} for module in (base, *saes)]
    model = SaeForCausalLM.from_base(base, saes=saes)
    for module, weights in zip((model.lm, *model.saes), before, strict=True):
        assert module.state_dict().keys() == weights.keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    assert model.lm is base
    assert model.saes[1] is saes[1]


def test_encoder_is_its_own_matrix_unless_tied():
    sae = tiny_sae(layer=0)
    assert sae.W_enc is dict(sae.named_parameters())["W_enc"]
    tied = tiny_sae(layer=0, tied=True)
    assert "W_enc" not in dict(tied.named_parameters())
    assert torch.equal(tied.W_enc, tied.W_dec.T)


def test_saes_keep_their_place():
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=2), tiny_sae(layer=0)])
    inputs = model(prompt(), output_sae_inputs=True).sae_inputs
    states = model(prompt(), output_hidden_states=True).hidden_states
    assert torch.equal(inputs[1], states[1])
    assert [config.layer for config in model.config.sae_configs] == [2, 0]
