"""One feature's vector in the hidden state, where, and how continuations are drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae_transformers.evaluation.settings import GenerationSettings
from sae_transformers.evaluation.steering.side_by_side import (
    FrequencyPenalty,
    check_layer,
    side_by_side,
    vector_steering,
)
from tests.create_training_data.words import word_tokenizer
from tests.tiny import WIDTH, prompt, tiny_model, tiny_sae

F64 = torch.float64


def change(model, ids: torch.Tensor, steering) -> torch.Tensor:
    """What steering adds to the hidden state at the SAE's place, (batch, seq, d)."""
    with torch.no_grad():
        seen = [
            model(ids, steering=way, output_hidden_states=True).hidden_states[2] for way in (steering, False)
        ]  # after the second block
    return seen[0] - seen[1]


def test_the_vector_is_added_to_all_tokens_but_the_first() -> None:
    model = tiny_model(dtype=F64, normalization="layer_norm")
    row = model.saes[0].W_dec[7].detach()
    added = change(model, prompt(), vector_steering(7, 2.5))
    torch.testing.assert_close(added[:, 1:], (2.5 * row).expand(2, 8, WIDTH))  # the row as it is
    assert float(added[:, 0].abs().max()) == 0.0
    norms = change(model, prompt(), vector_steering(7, 0.5, unit="norm"))
    assert float(norms[:, 1:].abs().min()) > 0
    with pytest.raises(ValueError, match="unit='norm'"):
        vector_steering(7, 0.5, unit="norm", legacy=True)


def test_another_place_is_refused() -> None:
    config = tiny_sae(layer=1).config
    check_layer(config, 1, "resid_post")
    check_layer(config, None)
    with pytest.raises(ValueError, match="layers.1.resid_post.*layer=2"):
        check_layer(config, 2)
    with pytest.raises(ValueError, match="site='mlp_out'"):
        check_layer(config, 1, "mlp_out")
    with pytest.raises(ValueError, match="does not name.*layer=0"):
        check_layer(tiny_sae().config, 0)


def test_frequency_penalty_counts() -> None:
    scores = torch.zeros(2, 5)
    ids = torch.tensor([[1, 1, 3], [0, 2, 4]])
    found = FrequencyPenalty(0.5)(ids, scores)
    assert found.tolist() == [[0, -1.0, 0, -0.5, 0], [-0.5, 0, -0.5, 0, -0.5]] and float(scores.abs().sum()) == 0


def test_side_by_side() -> None:
    model, tokenizer = tiny_model(), word_tokenizer()
    model.generation_config.eos_token_id = None
    options = GenerationSettings(6, 1.0, 0.9, samples_per_prompt=3)
    state = torch.random.get_rng_state()
    nothing = side_by_side(model, tokenizer, "w1 w2 w3", vector_steering(3, 0.0), options)
    assert nothing.steered == nothing.unsteered and len(set(nothing.steered)) > 1
    assert torch.equal(state, torch.random.get_rng_state())
    some = side_by_side(model, tokenizer, "w1 w2 w3", vector_steering(3, 30.0), options)
    assert some.unsteered == nothing.unsteered and some.steered != some.unsteered
    assert some == side_by_side(model, tokenizer, "w1 w2 w3", vector_steering(3, 30.0), options)
    assert some != side_by_side(model, tokenizer, "w1 w2 w3", vector_steering(3, 30.0), replace(options, seed=1))
    alone = GenerationSettings(20, temperature=0)
    greedy = side_by_side(model, tokenizer, "w1 w2", vector_steering(3, 0.0), alone)
    varied = side_by_side(model, tokenizer, "w1 w2", vector_steering(3, 0.0), alone, frequency_penalty=100.0)
    words = varied.unsteered[0].split()
    assert len(set(words)) == len(words) and not {"w1", "w2"} & set(words)
    assert len(set(greedy.unsteered[0].split())) < len(greedy.unsteered[0].split())


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("w1", {"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ("w1", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("w1", {"temperature": -1.0}, "temperature=-1.0"),
        ("w1", {"top_p": 0.0}, "top_p=0.0"),
        ("w1", {"temperature": 0, "samples_per_prompt": 2}, "samples_per_prompt=2"),
        ("", {}, "0 tokens"),
        ("w1 " * 100, {"max_new_tokens": 30}, "100 tokens"),
    ],
)
def test_bad_requests(text: str, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        side_by_side(tiny_model(), word_tokenizer(), text, vector_steering(3, 1.0), GenerationSettings(**options))
