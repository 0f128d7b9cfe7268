"""One SAE: its public mathematics, against formulas written out and the naive reference."""

from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from tests.invariants.naive import latents_of, pre_activations, reconstruction_of
from tests.tiny import tiny_sae

ACTIVATIONS = (
    "relu", "topk", "topk-sigmoid", "topk-tanh", "topk-identity", "abs_topk", "groupmax", "batch_topk", "jumprelu",
    "gated", "identity",
)  # fmt: skip
NORMALIZATIONS = ("none", "layer_norm", "constant_norm", "scalar")
HIDDEN = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 3
FEATURES = torch.tensor([5, 0, 63, 17])


def test_print_says_what_it_is():
    sae = tiny_sae(k=8, layer=1, site="mlp_out", concepts={"good": 3})
    assert str(sae) == "SparseAutoencoder(32 -> 64, topk, k=8, reads layers.1.mlp_out, 1 concept)"
    there = tiny_sae(activation="relu", d_out=16, hook="model.layers.0.mlp.input", hook_out="model.layers.0.mlp",
                     apply_b_dec_to_input=False)  # fmt: skip
    assert str(there) == (
        "SparseAutoencoder(32 -> 64 -> 16, relu, reads model.layers.0.mlp.input, "
        "writes model.layers.0.mlp, 0 concepts)"
    )
    assert str(tiny_sae(activation="jumprelu")) == "SparseAutoencoder(32 -> 64, jumprelu, no place yet, 0 concepts)"


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_and_decode_are_the_formulas(activation, normalization):
    sae = tiny_sae(activation=activation, normalization=normalization, input_scale=1.7, dtype=torch.float64)
    rows = HIDDEN.flatten(0, 1)
    latents = latents_of(sae, rows).view(2, 5, 64)
    assert (latents != 0).any()
    torch.testing.assert_close(sae.encode(HIDDEN), latents, rtol=1e-12, atol=1e-12)
    reconstruction = reconstruction_of(sae, rows).view(2, 5, 32)
    output = sae(HIDDEN)
    torch.testing.assert_close(output.latents, latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.reconstruction, reconstruction, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode(latents, HIDDEN), reconstruction, rtol=1e-12, atol=1e-12)
    pre = pre_activations(sae, rows).view(2, 5, 64)
    torch.testing.assert_close(sae.encode_pre_acts(HIDDEN), pre, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode_pre_acts(HIDDEN, FEATURES), pre[..., FEATURES], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode_selected(HIDDEN, FEATURES), latents[..., FEATURES], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encode_sparse(HIDDEN).to_dense(), latents, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"glu": True, "activation": "relu"},
        {"glu": True, "activation": "topk"},
        {"glu": True, "activation": "jumprelu"},
        {"scaled_selection": True},
        {"scaled_selection": True, "activation": "abs_topk"},
        {"normalize_output": False, "normalization": "layer_norm"},
        {"normalize_output": False, "normalization": "constant_norm"},
        {"normalize_output": False, "normalization": "scalar", "input_scale": 1.7},
    ],
    ids=str,
)
def test_variants_of_other_libraries_are_the_formulas(settings):
    sae = tiny_sae(dtype=torch.float64, **settings)
    rows = HIDDEN.flatten(0, 1)
    latents = latents_of(sae, rows).view(2, 5, 64)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    assert (latents != 0).any()
    torch.testing.assert_close(sae.encode(HIDDEN), latents, **close)
    torch.testing.assert_close(sae.encode_selected(HIDDEN, FEATURES), latents[..., FEATURES], **close)
    reconstruction = reconstruction_of(sae, rows).view(2, 5, 32)
    torch.testing.assert_close(sae(HIDDEN).reconstruction, reconstruction, **close)
    torch.testing.assert_close(sae.decode(latents, HIDDEN), reconstruction, **close)
    if not sae.config.normalize_output:
        torch.testing.assert_close(sae.decode(latents), reconstruction, **close)


def test_a_transcoder_may_normalise_what_it_reads_alone():
    sae = tiny_sae(
        d_out=20, normalization="layer_norm", normalize_output=False, apply_b_dec_to_input=False, activation="relu"
    )
    x = (HIDDEN - HIDDEN.mean(-1, keepdim=True)) / (HIDDEN.std(-1, keepdim=True) + 1e-5)
    expected = torch.relu(x.float() @ sae.W_enc + sae.b_enc) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(HIDDEN.float()).reconstruction, expected, rtol=1e-5, atol=1e-5)


def test_scalar_normalisation_needs_no_hidden_state_to_decode():
    sae = tiny_sae(normalization="scalar", input_scale=2.0, output_scale=0.5, dtype=torch.float64)
    latents = sae.encode(HIDDEN)
    torch.testing.assert_close(sae.decode(latents), sae.decode(latents, HIDDEN), rtol=1e-12, atol=1e-12)


def test_an_input_of_zeros_gives_finite_numbers():
    for normalization in NORMALIZATIONS:
        output = tiny_sae(normalization=normalization)(torch.zeros(1, 2, 32))
        assert output.reconstruction.isfinite().all()
        assert output.latents.isfinite().all()


def test_tied_weights_are_one_matrix():
    sae = tiny_sae(tied=True)
    assert "W_enc" not in dict(sae.named_parameters())
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.encode(HIDDEN.float()).shape == (2, 5, 64)


def test_a_transcoder_and_its_skip_connection():
    sae = tiny_sae(d_out=20, skip_connection=True, apply_b_dec_to_input=False, activation="relu", dtype=torch.float64)
    z = torch.relu(HIDDEN @ sae.W_enc + sae.b_enc)
    expected = z @ sae.W_dec + sae.b_dec + HIDDEN @ sae.W_skip.T
    torch.testing.assert_close(sae(HIDDEN).reconstruction, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="d_in=32, d_out=20"):
        SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64, d_out=20))


def test_low_precision_input_is_encoded_in_the_saes_precision():
    sae = tiny_sae(activation="relu")
    low = HIDDEN.bfloat16()
    output = sae(low)
    assert output.latents.dtype == torch.float32
    assert output.reconstruction.dtype == torch.bfloat16
    assert torch.equal(output.latents, sae.encode(low.float()))


def test_losses_are_the_formulas():
    sae = tiny_sae(activation="relu", concepts={"a": 3, "b": 9}, dtype=torch.float64)
    x = HIDDEN.flatten(0, 1)
    labels = torch.tensor([[1.0, 0.0], [0.0, -100.0]]).repeat(5, 1)
    found = sae.losses(x, labels)
    z, output = sae.encode(x), sae(x).reconstruction
    error = (output - x).square().mean(-1) / x.square().mean(-1)
    torch.testing.assert_close(found["reconstruction"], error.mean())
    mass = (z * sae.W_dec.norm(dim=-1)).sum(-1) / x.norm(dim=-1)
    torch.testing.assert_close(found["sparsity"], mass.mean())
    p = torch.sigmoid(sae.encode_pre_acts(x)[:, [3, 9]])
    terms = -(labels * p.log() + (1 - labels) * (1 - p).log())
    known = torch.where(labels == -100, torch.zeros_like(terms), terms)
    torch.testing.assert_close(found["conditioning"], known.sum(-1).mean())


def test_a_fresh_sae_is_its_own_inverse_direction():
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64))
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
