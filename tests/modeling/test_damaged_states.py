"""A hidden state with a NaN is seen as damaged in all that is made of it, whatever the activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.modeling.configuration_sparse_autoencoder import ACTIVATIONS
from tests.tiny import WIDTH, prompt, tiny_base, tiny_model, tiny_sae

NORMALIZATIONS = ("none", "layer_norm", "constant_norm", "scalar")
DAMAGED, WHOLE = 3, [0, 1, 2, 4, 5]  # tokens


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Six hidden states, one of them with a single NaN."""
    hidden = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    hidden[DAMAGED, 7] = torch.nan
    return hidden


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_nan_out(activation: str, normalization: str) -> None:
    sae = tiny_sae(activation=activation, normalization=normalization, input_scale=1.7)
    hidden, features = states(), torch.arange(64)
    with torch.no_grad():
        expected = sae(hidden[WHOLE])
        found = sae(hidden)
        for latents in (found.latents, sae.encode(hidden), sae.encode_sparse(hidden).to_dense()):
            assert latents[DAMAGED].isnan().any() and torch.allclose(latents[WHOLE], expected.latents, atol=1e-6)
        assert sae.encode_selected(hidden, features)[DAMAGED].isnan().all()
        assert torch.equal(sae.encode_selected(hidden, features)[WHOLE], sae.encode(hidden)[WHOLE])
        assert all(bool(sae.encode_sparse(hidden).column(f)[DAMAGED].isnan()) for f in (0, 63))
        for output in (found.reconstruction, sae.decode(found.latents, hidden)):
            assert output[DAMAGED].isnan().all()
            assert torch.allclose(output[WHOLE], expected.reconstruction, atol=1e-5)
        assert sae.decode(found.latents)[DAMAGED].isnan().all()
        assert sae.remove(hidden, features[:0])[DAMAGED].isnan().any()
        assert sae.remove(hidden, features, "own")[DAMAGED].isnan().all()
        terms = sae.losses(hidden, reduction="none")
    assert all(bool(term[DAMAGED].isnan()) and bool(term[WHOLE].isfinite().all()) for term in terms.values())


@pytest.mark.parametrize(
    "options", [{"glu": True}, {"skip_connection": True}, {"tied": True}, {"scaled_selection": True}]
)
@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_nan_with_every_part(activation: str, options: dict[str, Any]) -> None:
    if "scaled_selection" in options and activation != "topk":
        pytest.skip("for top-k activations alone")
    sae = tiny_sae(activation=activation, **options)
    output = sae(states()).reconstruction
    assert output[DAMAGED].isnan().all() and output[WHOLE].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_nan_too(activation: str, dtype: torch.dtype) -> None:
    """With gradients JumpReLU is a function of its own, and the decoder's product another one."""
    sae = tiny_sae(activation=activation, dtype=dtype)
    hidden = states(dtype).requires_grad_()
    output = sae(hidden)
    assert output.reconstruction[DAMAGED].isnan().all() and output.latents[DAMAGED].isnan().any()
    output.reconstruction.sum().backward()
    assert hidden.grad is not None and hidden.grad[WHOLE].isfinite().all()
    assert sae.W_dec.grad is not None and sae.W_dec.grad.isnan().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_damaged_base_is_not_mended_by_its_sae(activation: str) -> None:
    """Embeddings of one token are NaN: its own logits must be, with an SAE in the place of the hidden state too."""
    base, ids = tiny_base(), prompt(rows=1)
    with torch.no_grad():
        base.get_input_embeddings().weight[ids[0, -1]] = torch.nan
    model = tiny_model(saes=[tiny_sae(activation=activation, layer=1)])
    model.lm.load_state_dict(base.state_dict())
    for steering in (Steering(keep_error=False), Steering([FeatureEdit(0, 5, "set", 2.0)], keep_error=False)):
        logits = model(ids, steering=steering).logits
        assert logits[0, -1].isnan().all()
    found = model.detect(ids, feature=5)
    assert found.per_text.isnan().all() and found.per_token[0, -1].isnan()


def test_a_token_that_does_not_count_damages_no_text() -> None:
    model, ids = tiny_model(activation="jumprelu"), prompt(rows=1)
    expected = model.detect(ids, feature=5, pooling="mean").per_text
    read = model.saes[0].latents_of

    def first_damaged(normalized, features):
        return read(normalized, features).index_fill(1, torch.tensor([0]), torch.nan)

    model.saes[0].latents_of = first_damaged  # as attention may leave padding
    assert torch.equal(model.detect(ids, feature=5, pooling="mean").per_text, expected)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_maximum_is_not_taken_from_damaged_states(activation: str) -> None:
    sae = tiny_sae(activation=activation)
    before = sae.feature_max.clone()
    with pytest.raises(ValueError, match="finite hidden states"):
        sae.measure_feature_max(states())
    assert torch.equal(sae.feature_max, before)
