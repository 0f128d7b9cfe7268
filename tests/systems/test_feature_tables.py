"""Feature tables: the acceptance facts of seansica/sae-vector-steering, recomputed on matrices small enough to read.

Its shipped tables and reports carry no licence and are not here, so what follows from them alone is not tested; files
of the same form, made here, are.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.evaluation.features.coherence import coherence
from sae_transformers.evaluation.features.table import feature_table, logit_weights
from sae_transformers.evaluation.features.table_files import write_feature_table
from sae_transformers.evaluation.features.unembedding import unembedding
from sae_transformers.evaluation.steering.side_by_side import vector_steering
from tests.create_training_data.words import word_tokenizer
from tests.tiny import WIDTH, prompt, tiny_base, tiny_model, tiny_sae

F64 = torch.float64
W_DEC = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=F64)
W_U = torch.tensor([[2.0, -1.0, 0.0, 1.0], [0.0, 3.0, -3.0, 1.0]], dtype=F64)


# A. statistics


def test_statistics_of_the_toy() -> None:
    found = logit_weights(W_DEC, W_U, top_k=2)
    for name, expected in (
        ("mean", [0.5, 0.5]),
        ("std", [1.1180, 1.6882]),
        ("skewness", [0.0, -1.0974]),
        ("kurtosis", [1.64, 2.2924]),
    ):
        torch.testing.assert_close(getattr(found, name), torch.tensor(expected, dtype=F64), atol=5e-5, rtol=0)
    assert found.top_ids.tolist() == [[0, 3], [1, 3]]
    torch.testing.assert_close(found.top_weights, torch.tensor([[2.0, 1.0], [1.8, 1.4]]))
    assert found.bottom_ids.tolist() == [[1, 2], [2, 0]]


def random_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 8, generator=generator, dtype=F64), torch.randn(
        8, 3000, generator=generator, dtype=F64
    ).exp()


def test_kurtosis_is_bounded_by_skewness() -> None:
    found = logit_weights(*random_weights())
    assert bool((found.kurtosis >= 1 + found.skewness**2 - 1e-12).all())


def test_a_longer_row_has_the_same_shape() -> None:
    W_dec, unembed = random_weights()
    one, longer = logit_weights(W_dec, unembed), logit_weights(3.5 * W_dec, unembed)
    torch.testing.assert_close(longer.mean, 3.5 * one.mean)
    torch.testing.assert_close(longer.std, 3.5 * one.std)
    torch.testing.assert_close(longer.skewness, one.skewness)
    torch.testing.assert_close(longer.kurtosis, one.kurtosis)
    assert torch.equal(longer.top_ids, one.top_ids)


def test_a_turned_row_turns_mean_and_skewness() -> None:
    W_dec, unembed = random_weights()
    one, turned = logit_weights(W_dec, unembed), logit_weights(-W_dec, unembed)
    torch.testing.assert_close(turned.mean, -one.mean)
    torch.testing.assert_close(turned.skewness, -one.skewness)
    torch.testing.assert_close(turned.std, one.std)
    torch.testing.assert_close(turned.kurtosis, one.kurtosis)
    assert torch.equal(turned.top_ids, one.bottom_ids) and torch.equal(turned.bottom_weights, -one.top_weights)


def test_a_centred_unembedding_makes_every_mean_zero() -> None:
    W_dec, unembed = random_weights()
    centred = logit_weights(W_dec, unembed - unembed.mean(1, keepdim=True))
    assert float(centred.mean.abs().max()) < 1e-12
    table = feature_table(tiny_base("gpt2"), word_tokenizer(), tiny_sae(layer=1))
    assert float(table.weights.mean.abs().max()) < 1e-6
    model = tiny_base("gpt2")
    raw = logit_weights(tiny_sae(layer=1).W_dec, unembedding(model, centre=False))
    assert float(raw.mean.abs().max()) > 1e-3


# B. coherence


def test_coherence_of_the_toy() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]], dtype=F64)
    weights = torch.tensor([[3.0, 2.0, 1.0]], dtype=F64)
    assert float(coherence(embeddings, weights)) == pytest.approx((6 * 0.6 + 3 * 0 + 2 * 0.8) / (11 + 1e-8), abs=1e-12)
    assert float(coherence(embeddings, weights)) == pytest.approx(0.4727273, abs=5e-8)


def test_coherence_of_one_word_repeated_and_of_one_word() -> None:
    same, weights = torch.ones(1, 3, 2, dtype=F64), torch.tensor([[3.0, 2.0, 1.0]], dtype=F64)
    assert float(coherence(same, weights)) == pytest.approx(11 / (11 + 1e-8), abs=1e-15)
    assert float(coherence(same, weights, torch.tensor([[True, False, False]]))) == 0.0
    assert float(coherence(same[:, :1], weights[:, :1])) == 0.0


# C. steering


def change(model: SaeForCausalLM, ids: torch.Tensor, steering: Steering) -> torch.Tensor:
    """What steering adds to the hidden state at the SAE's place, (batch, seq, d)."""
    with torch.no_grad():
        states = [model(ids, steering=way, output_hidden_states=True).hidden_states[2] for way in (steering, False)]
    return states[0] - states[1]


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_all_tokens_of_the_prompt_but_the_last_change_by_the_row(normalization: str) -> None:
    model, length = tiny_model(dtype=F64, normalization=normalization), 9
    row = model.saes[0].W_dec[11].detach()
    added = change(model, prompt(1, length), vector_steering(11, 300.0, legacy=True))[0]
    torch.testing.assert_close(added[:-1], (300.0 * row).expand(length - 1, WIDTH), rtol=1e-9, atol=1e-9)
    assert float(added[-1].abs().max()) == 0.0
    half = change(model, prompt(1, length), vector_steering(11, 150.0, legacy=True))[0]
    torch.testing.assert_close(added, 2 * half, rtol=1e-9, atol=1e-9)


def test_coefficient_0_and_prompts_of_one_token_change_nothing() -> None:
    model = tiny_model(dtype=F64)
    assert float(change(model, prompt(), vector_steering(11, 0.0, legacy=True)).abs().max()) == 0.0
    assert float(change(model, prompt(1, 1), vector_steering(11, 300.0, legacy=True)).abs().max()) == 0.0


def test_with_the_cache_only_the_prompt_is_steered() -> None:
    """Equal to a forward pass over prompt and continuation with the prompt's first tokens steered; and to `generate`
    of the unsteered model where the prompt is one token."""
    model = tiny_model(dtype=F64)
    model.generation_config.eos_token_id = None
    steering = vector_steering(11, 40.0, legacy=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = prompt(2, 6)
    found = model.generate(ids, steering=steering, **options)
    explicit = Steering([FeatureEdit(0, 11, "direction", 40.0)], positions=[(0, 5)])
    with torch.no_grad():
        logits = model(found, steering=explicit).logits
    assert torch.equal(logits[:, 5:-1].argmax(-1), found[:, 6:])
    assert not torch.equal(found, model.generate(ids, steering=False, **options))
    one = prompt(1, 1)
    assert torch.equal(
        model.generate(one, steering=steering, **options), model.generate(one, steering=False, **options)
    )


# The original's file


def test_the_form_of_its_json(tmp_path: Path) -> None:
    table = feature_table(tiny_base(), word_tokenizer(), tiny_sae(layer=1), top_k=10)
    write_feature_table(table, tmp_path)
    found = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    assert list(found) == [f"feature_{i}" for i in range(64)]
    assert all(list(entry) == ["top_words"] and len(entry["top_words"].split(" ")) == 10 for entry in found.values())
