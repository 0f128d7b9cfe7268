"""The strongest features of each token are those of the SAE's own code, and reading them is unsteered."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.tiny import prompt, tiny_base, tiny_sae

ACTIVATIONS = [{"activation": "topk", "k": 5}, {"activation": "jumprelu"}, {"activation": "abs_topk", "k": 4}]


@pytest.mark.parametrize("options", ACTIVATIONS, ids=lambda options: options["activation"])
def test_top_features_are_the_largest_of_the_dense_code(options):
    base = tiny_base()
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=0), tiny_sae(layer=1, **options)])
    found = model.top_features(prompt(), k=3, sae=1)
    hidden = base(prompt(), output_hidden_states=True).hidden_states[2]
    dense = model.saes[1].encode(hidden)
    expected = dense.abs().topk(3, dim=-1).indices
    values = dense.gather(-1, expected)
    assert found.features.shape == (*prompt().shape, 3)
    assert not found.counted[:, 0].any() and found.counted[:, 1:].all()
    assert (found.features[:, 0] == -1).all() and (found.values[:, 0] == 0).all()
    torch.testing.assert_close(found.values[:, 1:], values[:, 1:], rtol=1e-5, atol=1e-5)
    there = found.values[:, 1:] != 0
    assert torch.equal(found.features[:, 1:][there], expected[:, 1:][there]) and there.any()


def test_padding_changes_nothing_and_more_than_there_are_is_filled():
    model = SaeForCausalLM.from_base(tiny_base("gpt2"), saes=[tiny_sae(layer=1, activation="topk", k=5)])
    ids = prompt(2, 6)
    alone = model.top_features(ids, k=50)
    assert alone.features.shape[-1] == 5
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)], 1)
    left = model.top_features({"input_ids": padded, "attention_mask": mask}, k=50)
    assert (left.features[:, :4] == -1).all()
    assert torch.equal(left.features[:, 3:], alone.features)
    torch.testing.assert_close(left.values[:, 3:], alone.values, rtol=1e-5, atol=1e-5)


def test_reading_is_unsteered_whatever_is_in_force():
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=0), tiny_sae(layer=1)])
    plain, score = model.top_features(prompt(), sae=1), model.detect(prompt(), feature=3, sae=1, pre_activations=True)
    push = Steering([FeatureEdit(feature=3, op="add", value=20.0)])
    with model.steered(push):
        assert torch.equal(model.top_features(prompt(), sae=1).values, plain.values)
        again = model.detect(prompt(), feature=3, sae=1, pre_activations=True)
        assert torch.equal(again.per_token, score.per_token)
        steered = model(prompt(), features={1: None}).sae_features[1]
    assert not torch.equal(steered.to_dense(), model(prompt(), features={1: None}).sae_features[1].to_dense())


def test_detect_counts_activations_without_the_first_token():
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1)])
    dense = model(prompt(), output_features=True).sae_features[0].to_dense()[..., 3]
    found = model.detect(prompt(), feature=3)
    torch.testing.assert_close(found.per_text, dense[:, 1:].mean(-1))
    assert (found.per_token[:, 0] == 0).all()


def test_how_many_is_checked():
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1)])
    with pytest.raises(ValueError, match="k=0"):
        model.top_features(prompt(), k=0)
    with pytest.raises(ValueError, match="sae=1"):
        model.top_features(prompt(), sae=1)
