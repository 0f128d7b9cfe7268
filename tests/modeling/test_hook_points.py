"""Places by name: which module each site is, and errors for places that are not there."""

import pytest

from sae_transformers import SaeForCausalLM
from sae_transformers.modeling.hook_points import find_blocks, find_hook_point
from tests.invariants.naive import block_list, site_module
from tests.tiny import ARCHITECTURES, LAYERS, tiny_base, tiny_sae


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_are_the_modules_written_down_for_each_family(architecture):
    base = tiny_base(architecture)
    blocks, path = find_blocks(base, base.config)
    assert blocks is block_list(base)
    assert base.get_submodule(path) is blocks
    for layer in range(LAYERS):
        for site in ("resid_pre", "resid_post", "mlp_out", "attn_out"):
            point = find_hook_point(base, base.config, f"layers.{layer}.{site}")
            assert point.module is site_module(base, layer, site)
            assert base.get_submodule(point.path) is point.module
            assert point.side == ("input" if site == "resid_pre" else "output")


INSIDE = {  # what reads: the MLP, its last linear map, the attention's last linear map
    "gpt2": ("mlp", "mlp.c_proj", "attn.c_proj"),
    "gpt_neox": ("mlp", "mlp.dense_4h_to_h", "attention.dense"),
    "opt": ("fc1", "fc2", "self_attn.out_proj"),
    "phi": ("mlp", "mlp.fc2", "self_attn.dense"),
    "bloom": ("mlp", "mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon": ("mlp", "mlp.dense_4h_to_h", "self_attention.dense"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_inside_mlp_and_attention(architecture):
    base = tiny_base(architecture)
    paths = INSIDE.get(architecture, ("mlp", "mlp.down_proj", "self_attn.o_proj"))
    for site, path in zip(("mlp_in", "mlp_act", "attn_heads"), paths, strict=True):
        if site == "mlp_act" and architecture in ("mixtral", "qwen2_moe", "gpt_oss"):
            with pytest.raises(ValueError, match="no one module for mlp_act"):
                find_hook_point(base, base.config, f"layers.1.{site}")
            continue
        point = find_hook_point(base, base.config, f"layers.1.{site}")
        assert point.module is block_list(base)[1].get_submodule(path)
        assert point.side == "input" and base.get_submodule(point.path) is point.module


def test_module_paths_with_and_without_prefix_and_side():
    base = tiny_base()
    down = base.model.layers[1].mlp.down_proj
    for path, side in (
        ("model.layers.1.mlp.down_proj", "output"),
        ("layers.1.mlp.down_proj", "output"),
        ("layers.1.mlp.down_proj.output", "output"),
        ("model.layers.1.mlp.down_proj.input", "input"),
    ):
        point = find_hook_point(base, base.config, path)
        assert (point.module, point.side) == (down, side)


def test_a_module_path_of_another_class_with_the_same_blocks():
    base = tiny_base("gemma3_text")
    norm = base.model.layers[1].post_feedforward_layernorm
    paths = ("model.layers.1", "model.language_model.layers.1", "layers.1", "language_model.model.layers.1")
    for lm in (base, base.model):  # with a head and without
        for path in paths:
            point = find_hook_point(lm, base.config, f"{path}.post_feedforward_layernorm.output")
            assert (point.module, point.side) == (norm, "output")
            assert find_hook_point(lm, base.config, f"{path}.output").module is base.model.layers[1]


def test_places_that_are_not_there_are_named():
    base = tiny_base()
    with pytest.raises(ValueError, match=r"in \[0, 3\).*Received: layer=3"):
        SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=3)])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*Received: hook='model\.layers\.1\.mpl'"):
        SaeForCausalLM.from_base(base, saes=[tiny_sae(hook="model.layers.1.mpl")])
    with pytest.raises(ValueError, match="'resid_mid'"):
        tiny_sae(layer=1, site="resid_mid")
    base.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="No list of 7 decoder blocks in LlamaForCausalLM"):
        find_blocks(base, base.config)


def test_a_block_without_the_module_says_what_it_has():
    base = tiny_base()
    for block in base.model.layers:
        block.something = block.mlp
        del block.mlp
    with pytest.raises(ValueError, match="site='mlp_out'.*something"):
        find_hook_point(base, base.config, "layers.0.mlp_out")


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(ValueError, match="reads 16 values.*width of 32"):
        SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1, d_in=16)])
