"""`fold_decoder_norm`: unit rows, latents times the norms, the same reconstruction; formulas for each activation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.configuration_sparse_autoencoder import ACTIVATIONS
from sae_transformers.modeling.conversion.export import describe
from sae_transformers.modeling.decoder_norm import maxima_convention
from tests.modeling.conversion.made import random_sae

TOPK = {"activation": "topk", "k": 6}
CASES: dict[str, dict[str, Any]] = {
    "relu": {},
    "identity": {"activation": "identity"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated"},
    "topk": TOPK,
    "topk-identity": {"activation": "topk-identity", "k": 6},
    "abs_topk": {"activation": "abs_topk", "k": 6},
    "groupmax": {"activation": "groupmax", "k": 8},
    "batch_topk": {"activation": "batch_topk", "k": 6},
    "topk of scaled values": {**TOPK, "scaled_selection": True},
    "topk of tied weights": {**TOPK, "tied": True},
    "relu of tied weights": {"tied": True},
    "GLU": {"glu": True},
    "layer norm": {"activation": "jumprelu", "normalization": "layer_norm"},
    "one scale": {"normalization": "scalar", "input_scale": 0.3, "output_scale": 2.0},
    "transcoder with a skip": {
        **TOPK, "d_out": 9, "skip_connection": True, "apply_b_dec_to_input": False,
        "hook": "layers.1.mlp.input", "hook_out": "layers.1.mlp.output",
    },
}  # fmt: skip
REFUSED = ("topk-sigmoid", "topk-tanh")


def test_every_activation_has_a_case_or_a_refusal() -> None:
    assert {settings.get("activation", "relu") for settings in CASES.values()} | set(REFUSED) == set(ACTIVATIONS)


def pair(folder: Path, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[SparseAutoencoder, Any]:
    """An SAE as it is, and folded; latent 5 writes nothing."""
    sae = random_sae(dtype=dtype, **settings)
    with torch.no_grad():
        sae.W_dec[5] = 0
        sae.feature_max.copy_(torch.linspace(0, 3, 40))
    sae.save_pretrained(folder)
    return sae, SparseAutoencoder.from_pretrained(folder, fold_decoder_norm=True).requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_the_latents_are_times_the_norms_and_the_reconstruction_stays(tmp_path: Path, name: str) -> None:
    sae, folded = pair(tmp_path, **CASES[name])
    x = 2 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = sae(x), folded(x)
    norms = sae.W_dec.norm(dim=-1)
    norms[5] = 1.0
    assert (norms - 1).abs().max() > 1 and 0 < (before.latents != 0).sum() < 64 * 40 or name == "identity"
    torch.testing.assert_close(after.latents, before.latents * norms, rtol=1e-9, atol=1e-9)
    assert torch.equal(after.latents != 0, before.latents != 0)
    torch.testing.assert_close(after.reconstruction, before.reconstruction, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), (norms != 1).to(norms.dtype))
    torch.testing.assert_close(folded.feature_max, sae.feature_max * norms)
    some = torch.tensor([3, 17])
    torch.testing.assert_close(folded.encode_selected(x, some), (before.latents * norms)[:, some])


@pytest.mark.parametrize("name", ["relu", "gated", "topk", "batch_topk"])
def test_in_float32_the_reconstruction_is_equal_to_a_millionth(tmp_path: Path, name: str) -> None:
    sae, folded = pair(tmp_path, torch.float32, **CASES[name])
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    before, after = sae(x).reconstruction, folded(x).reconstruction
    assert float((before - after).abs().max() / before.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["batch_topk", "topk of tied weights", "gated"])
def test_it_is_recorded_and_saved_as_it_is(tmp_path: Path, name: str) -> None:
    sae, folded = pair(tmp_path / "sae", **CASES[name])
    assert folded.config.metadata["decoder_norm_folded"] is True and "decoder norms folded" in describe(folded.config)
    assert "decoder_norm_folded" not in sae.config.metadata
    folded.save_pretrained(tmp_path / "folded")
    again = SparseAutoencoder.from_pretrained(tmp_path / "folded")
    assert again.config == folded.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in folded.state_dict().items())
    twice = SparseAutoencoder.from_pretrained(tmp_path / "folded", fold_decoder_norm=True)
    torch.testing.assert_close(twice.W_dec, folded.W_dec)
    assert maxima_convention(sae.config, sae.feature_max) == "of latents as stored"
    assert "as on Neuronpedia" in maxima_convention(folded.config, folded.feature_max)
    assert maxima_convention(sae.config, torch.zeros(40)) == ""


def test_half_precision_keeps_its_type(tmp_path: Path) -> None:
    sae, folded = pair(tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {torch.bfloat16}
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    before, after = sae(x).reconstruction, folded(x).reconstruction
    assert float((before - after).abs().max() / before.abs().max()) < 0.03


@pytest.mark.parametrize("activation", REFUSED)
def test_what_does_not_scale_is_refused(tmp_path: Path, activation: str) -> None:
    random_sae(activation=activation, k=6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be folded: .* Received: activation='{activation}'"):
        SparseAutoencoder.from_pretrained(tmp_path, fold_decoder_norm=True)
