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
    with pytest.raises(ValueError, match="reads 16 values.*hidden size of 32"):
        SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1, d_in=16)])
