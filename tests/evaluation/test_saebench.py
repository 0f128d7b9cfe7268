"""The adapter has what SAEBench reads, and its numbers are the SAE's. What SAEBench makes of it: tests/parity."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from sae_transformers.evaluation.saebench import for_saebench
from tests.tiny import WIDTH, tiny_sae

HIDDEN = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
PLACE = {"layer": 1, "site": "resid_post"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "gated"},
        {"activation": "jumprelu"},
        {"activation": "batch_topk"},
        {"normalization": "layer_norm"},
        {"normalization": "constant_norm"},
        {"normalization": "scalar", "input_scale": 0.3},
        {"tied": True},
    ],
)
def test_the_adapter_computes_what_the_sae_computes(settings) -> None:
    sae = tiny_sae(**{**PLACE, **settings})
    adapter = for_saebench(sae, "tiny")
    latents = adapter.encode(HIDDEN)
    assert torch.equal(latents, sae.encode(HIDDEN))
    torch.testing.assert_close(adapter.decode(latents), sae(HIDDEN).reconstruction)
    assert torch.equal(adapter(HIDDEN), sae(HIDDEN).reconstruction)
    for name in ("W_enc", "W_dec", "b_dec", "b_mag" if settings.get("activation") == "gated" else "b_enc"):
        assert torch.equal(getattr(adapter, name), getattr(sae, name))
    assert (adapter.device, adapter.dtype) == (sae.device, sae.dtype)
    with pytest.raises(AttributeError, match="hook_z_reshaping_mode"):
        _ = adapter.hook_z_reshaping_mode


def test_the_config_names_the_place_as_transformer_lens_does() -> None:
    cfg = for_saebench(tiny_sae(layer=2, site="mlp_out"), "tiny", context_size=64).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("tiny", "blocks.2.hook_mlp_out", 2)
    assert (cfg.d_in, cfg.d_sae, cfg.context_size, cfg.dtype) == (WIDTH, 64, 64, "float32")
    assert cfg.to_dict() == asdict(cfg) and "metadata" not in cfg.to_dict()
    assert cfg.metadata.hook_name == cfg.hook_name and cfg.metadata.prepend_bos is True
    other = for_saebench(tiny_sae(hook="model.layers.1"), "tiny", hook_name="blocks.1.hook_resid_post").cfg
    assert (other.hook_layer, other.hook_name) == (1, "blocks.1.hook_resid_post")


def test_it_moves_as_a_module_does() -> None:
    adapter = for_saebench(tiny_sae(**PLACE), "tiny").to(dtype=torch.float64)
    assert adapter.dtype == torch.float64 and adapter.encode(HIDDEN).dtype == torch.float64


def test_latents_of_other_tokens_are_refused_where_tokens_are_normalised() -> None:
    adapter = for_saebench(tiny_sae(**PLACE, normalization="layer_norm"), "tiny")
    latents = adapter.encode(HIDDEN)
    with pytest.raises(ValueError, match=r"Received: \(1, 5, 64\) after \(2, 5, 32\)"):
        adapter.decode(latents[:1])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="a transcoder"):
        sae = tiny_sae(apply_b_dec_to_input=False, hook="layers.2.mlp.input", hook_out="layers.2.mlp.output")
        for_saebench(sae, "tiny")
    with pytest.raises(ValueError, match="hook='model.layers.1'"):
        for_saebench(tiny_sae(hook="model.layers.1"), "tiny")
    with pytest.raises(ValueError, match="hook_name='embed'"):
        for_saebench(tiny_sae(hook="model.layers.1"), "tiny", hook_name="embed")
