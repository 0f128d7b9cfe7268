"""`mlp_out` and `attn_out` are what a block adds to its residual stream, or are refused; family by family.

The reference of `attn_out` is the same addition to the stream right before the MLP reads it, by plain hooks: the norm
before the MLP reads v more, and so does whoever reads the block.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.latents.hidden_states import HiddenStateReader
from sae_transformers.modeling import hook_families
from sae_transformers.modeling.hook_points import find_blocks, find_hook_point
from tests.tiny import WIDTH, prompt, tiny_base, tiny_sae

COMMON = {
    "vocab_size": 99, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "sliding_window": 6,
    "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "d_model": WIDTH, "n_heads": 4, "n_layers": 3, "n_positions": 128,
    "max_seq_len": 128, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 4, "shared_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "laurel_rank": 4, "altup_num_inputs": 2,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 64, "lru_width": WIDTH, "attention_window_size": 6,
}  # fmt: skip
HALF = {"residual_multiplier": 0.5}
SETTINGS = {
    "bert": {"is_decoder": True}, "roberta-prelayernorm": {"is_decoder": True}, "megatron-bert": {"is_decoder": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}, "biogpt": {}, "ctrl": {"dff": 48},
    "falcon": {"ffn_hidden_size": 48, "alibi": False},
    "granite": HALF, "granitemoe": HALF, "granitemoeshared": HALF, "granite_swa": HALF, "granitemoe_swa": HALF,
    "granitemoehybrid": {**HALF, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8},
    "hyperclovax": {"residual_multiplier": 1.0}, "minicpm3": {"num_key_value_heads": 4},
    "minimax": {"layer_types": ["full_attention"] * 3, "block_size": 4},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv"]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma3n_text": {
        "intermediate_size": [48] * 3, "activation_sparsity_pattern": [0.5, 0.0, 0.0], "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "bloom": {"apply_residual_connection_post_layernorm": True},
    "dory": {}, "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def base_of(family: str, **changes) -> Any:
    """A tiny base whose every weight matters, biases, scales and multipliers included."""
    given = {**COMMON, **SETTINGS.get(family, {}), **changes}
    known = set(CONFIG_MAPPING[family]().to_dict()) | set(CONFIG_MAPPING[family].attribute_map)
    config = AutoConfig.for_model(family, **{k: v for k, v in given.items() if k in known or k in changes})
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in base.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if not any(part in name for part in ("A_log", "dt_bias", "conv")):
                p.copy_(noise * 0.15) if p.ndim > 1 else p.add_(noise * 0.1)
        for name, buffer in base.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.8)
    return base


def steered(base: Any, site: str, layer: int = 1, value: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits with a direction added at a site, and that direction (32,)."""
    sae = tiny_sae(layer=layer, site=site)
    edit = Steering([FeatureEdit(feature=3, op="direction", value=value)])
    model = SaeForCausalLM.from_base(copy.deepcopy(base), saes=[sae])
    with torch.no_grad():
        return model(prompt(), steering=edit, use_cache=False).logits, value * sae.W_dec[3]


def hooked(base: Any, block: str, before: tuple[str, ...], v: Tensor) -> Tensor:
    """Logits with v added, by plain hooks, to the inputs of modules of a block and to the block's output."""

    def adding(module, args, kwargs):
        if args:
            return (args[0] + v, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + v}

    def after(module, args, output):
        return output + v if isinstance(output, Tensor) else type(output)((output[0] + v, *output[1:]))

    module = base.get_submodule(block)
    handles = [module.get_submodule(n).register_forward_pre_hook(adding, with_kwargs=True) for n in before]
    handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            return base(prompt(), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


# family: (changes, block, what reads the stream between attention and MLP, module of mlp_out, module of attn_out)
RIGHT = {
    "afmoe": ({}, "model.layers.1", ("pre_mlp_layernorm",), "post_mlp_layernorm", "post_attention_layernorm"),
    "lfm3": ({}, "model.layers.1", ("ffn_norm",), "post_ffn_norm", "post_operator_norm"),
    "inkling_text": ({}, "model.layers.1", ("post_attention_layernorm",), "mlp_sconv", "attn_sconv"),
    "hyperclovax": ({}, "model.layers.1", ("post_attention_layernorm",), "post_norm2", "post_norm1"),
    "granite": (
        {"residual_multiplier": 1.0}, "model.layers.1", ("post_attention_layernorm",), "mlp", "self_attn"
    ),
    "mpt": ({}, "transformer.blocks.1", ("norm_2",), "ffn.down_proj", "attn"),
    "ctrl": ({}, "transformer.h.1", ("layernorm2",), "ffn", "multi_head_attention"),
    "biogpt": ({}, "biogpt.layers.1", ("final_layer_norm",), "fc2", "self_attn"),
    "olmo2": ({}, "model.layers.1", ("mlp",), "post_feedforward_layernorm", "post_attention_layernorm"),
    "glm4": (
        {}, "model.layers.1", ("post_attention_layernorm",), "post_mlp_layernorm", "post_self_attn_layernorm"
    ),
    "gptj": ({"rotary_dim": 8}, "transformer.h.1", (), "mlp", "attn"),
    "falcon": ({"parallel_attn": False}, "transformer.h.1", ("post_attention_layernorm",), "mlp", "self_attention"),
    "gpt_neox": (
        {"use_parallel_residual": False}, "gpt_neox.layers.1", ("post_attention_layernorm",), "mlp", "attention"
    ),
    "roberta-prelayernorm": (
        {}, "roberta_prelayernorm.encoder.layer.1", ("intermediate",), "output.dense", "attention.output.dense"
    ),
    "rwkv": ({"attention_hidden_size": WIDTH}, "rwkv.blocks.1", ("ln2",), "feed_forward", "attention"),
}  # fmt: skip


@pytest.mark.parametrize("family", [name for name in RIGHT if name in CONFIG_MAPPING])
def test_sites_are_what_the_block_adds(family):
    changes, block, between, mlp, attention = RIGHT[family]
    base = base_of(family, **changes)
    for site, path in (("mlp_out", mlp), ("attn_out", attention)):
        assert find_hook_point(base, base.config, f"layers.1.{site}").path == f"{block}.{path}"
    at_mlp, v = steered(base, "mlp_out")
    close(at_mlp, hooked(base, block, (), v))
    close(at_mlp, steered(base, "resid_post")[0])
    close(steered(base, "attn_out")[0], hooked(base, block, between, v))


NOT_THERE = {
    "granite": (("mlp_out", "attn_out"), "multiplies this tensor by `residual_multiplier`, 0.5"),
    "granitemoe": (("mlp_out", "attn_out"), "`residual_multiplier`, 0.5"),
    "granitemoehybrid": (("mlp_out", "attn_out"), "`residual_multiplier`, 0.5"),
    "granitemoeshared": (("mlp_out", "attn_out"), "`residual_multiplier`, 0.5"),
    "granite_swa": (("mlp_out", "attn_out"), "`residual_multiplier`, 0.5"),
    "granitemoe_swa": (("mlp_out", "attn_out"), "`residual_multiplier`, 0.5"),
    "minicpm3": (("mlp_out", "attn_out"), "`residual_scale`"),
    "minimax": (("mlp_out", "attn_out"), "scales the normalised residual stream"),
    "falcon_h1": (("attn_out",), "a Mamba branch"),
    "zaya": (("mlp_out", "attn_out"), "scales and shifts"),
    "dory": (("mlp_out", "attn_out"), "part of the way"),
    "bert": (("mlp_out", "attn_out"), "normalises the sum"),
    "openai-gpt": (("mlp_out", "attn_out"), "normalises the sum"),
    "gemma3n_text": (("resid_pre", "resid_post", "mlp_out", "attn_out"), "several residual streams"),
    "hy_v4": (("resid_pre", "resid_post", "mlp_out", "attn_out"), "several residual streams"),
    "deepseek_v4": (("resid_pre", "resid_post", "mlp_out", "attn_out"), "several residual streams"),
    "xlnet": (("resid_post",), "the sequence before the batch"),
}  # fmt: skip


@pytest.mark.parametrize("family", [name for name in NOT_THERE if name in CONFIG_MAPPING])
def test_a_family_without_the_tensor_is_refused_when_the_model_is_made(family):
    sites, reason = NOT_THERE[family]
    base = base_of(family)
    for site in sites:
        with pytest.raises(ValueError, match=reason) as error:
            SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1, site=site)])
        text = str(error.value)
        assert (
            f"({family})" in text and f"Received: site={site!r}, layer=1" in text and "`hook`, a module path" in text
        )
        assert ("Use site='resid_post'" in text) == ("resid_post" not in sites)
    if "resid_post" not in sites:
        SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1, site="resid_post")])


def test_what_a_refusal_offers_works():
    base = base_of("granite")
    with pytest.raises(ValueError, match=r"hook='model\.layers\.1\.mlp'"):
        find_hook_point(base, base.config, "layers.1.mlp_out")
    assert find_hook_point(base, base.config, "model.layers.1.mlp").module is base.model.layers[1].mlp


def test_post_norm_opt_is_refused_and_pre_norm_opt_is_not():
    base = base_of("opt", do_layer_norm_before=False)
    for site in ("mlp_out", "attn_out"):
        with pytest.raises(ValueError, match=r"OPTDecoderLayer \(opt\) normalises the sum"):
            find_hook_point(base, base.config, f"layers.1.{site}")
    assert find_hook_point(base_of("opt"), base.config, "layers.1.mlp_out").path.endswith("layers.1.fc2")


def test_experts_beside_a_shared_mlp():
    """With a multiplier of one the attention's output is what is added; the experts' alone is not."""
    for family in ("granitemoeshared", "granitemoehybrid"):
        base = base_of(family, residual_multiplier=1.0)
        with pytest.raises(ValueError, match="the sum of its experts and of a shared MLP"):
            find_hook_point(base, base.config, "layers.1.mlp_out")
        assert find_hook_point(base, base.config, "layers.1.attn_out").path == "model.layers.1.self_attn"


def test_a_block_of_another_kind_has_no_attention():
    for family, layer in (("lfm3", 0), ("recurrent_gemma", 0)):
        if family in CONFIG_MAPPING:
            base = base_of(family)
            with pytest.raises(ValueError, match=rf"\({family}\).*Received: site='attn_out', layer=0"):
                find_hook_point(base, base.config, f"layers.{layer}.attn_out")
            assert find_hook_point(base, base.config, f"layers.{layer}.mlp_out").path.startswith("model.layers.0.")


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="a newer family")
def test_gemma_4_changes_the_stream_after_the_mlp():
    """v at `mlp_out` is added to the stream; then come the per-layer input, which reads it, and the layer scalar."""
    base = base_of("gemma4_text")
    block = base.model.layers[1]
    assert float(block.layer_scalar) == pytest.approx(0.8)
    seen = []
    handle = block.per_layer_input_gate.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        base(prompt(), use_cache=False)
    handle.remove()
    sae = tiny_sae(layer=1, site="mlp_out")
    model = SaeForCausalLM.from_base(base, saes=[sae])
    handle = block.per_layer_input_gate.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        edit = Steering([FeatureEdit(feature=3, op="direction", value=2.0)])
        at_mlp = model(prompt(), steering=edit, use_cache=False).logits
    handle.remove()
    close(seen[1] - seen[0], (2 * sae.W_dec[3]).expand_as(seen[0]).detach())
    with torch.no_grad():
        block.per_layer_projection.weight.zero_()  # what is left is the scalar
        at_mlp = model(prompt(), steering=edit, use_cache=False).logits
    close(at_mlp, steered(base, "resid_post", value=1.6)[0])


class Block(nn.Module):
    """A block that nobody has read: remote code, or a newer release."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)


def test_an_unknown_block_goes_by_the_general_rules():
    base = nn.Module()
    base.blocks = nn.ModuleList([Block(), Block()])
    config: Any = AutoConfig.for_model("llama", num_hidden_layers=2)
    config.model_type = "of-somebody"
    assert find_hook_point(base, config, "layers.1.mlp_out").path == "blocks.1.mlp"
    assert find_hook_point(base, config, "layers.1.attn_out").path == "blocks.1.attn"


def test_a_class_derived_from_a_known_block_is_known():
    class Own(nn.Module):
        pass

    Own.__name__ = "MiniMaxDecoderLayer"

    class Mine(Own):
        pass

    assert hook_families.refusal_of(Mine(), "mine", "mlp_out")
    assert hook_families.refusal_of(nn.Linear(2, 2), "mine", "mlp_out") is None


# -- several streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [name for name in ("gemma3n_text", "hy_v4", "deepseek_v4") if name in CONFIG_MAPPING]
)
def test_a_block_of_several_streams_is_refused_as_a_hook_too(family):
    base = base_of(family)
    for hook in ("model.layers.1", "layers.1.output", "model.layers.1.input"):
        with pytest.raises(ValueError, match=r"\(batch, seq, width\).*hook='model\.layers\.1\.mlp'"):
            SaeForCausalLM.from_base(base, saes=[tiny_sae(hook=hook)])
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(hook="model.layers.1.mlp")])
    edit = Steering([FeatureEdit(feature=3, op="direction", value=2.0)])
    with torch.no_grad():
        plain = model(prompt(), use_cache=False).logits
        assert not torch.allclose(model(prompt(), steering=edit, use_cache=False).logits, plain)


# -- multimodal bases -------------------------------------------------------------------------------------------------


def gemma_3(vision_layers: int = 3) -> Any:
    """With as many blocks in the vision tower as in the text model, unless told otherwise."""
    text = {
        "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": vision_layers, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_id": 290}
    config = Gemma3Config(text_config=text, vision_config=vision, **sizes)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("vision_layers", [2, 3])
def test_the_blocks_of_a_multimodal_base_are_the_text_models(vision_layers):
    base = gemma_3(vision_layers)
    for config in (base.config, base.config.text_config):
        blocks, path = find_blocks(base, config)
        assert blocks is base.model.language_model.layers and path == "model.language_model.layers"
    inner, path = find_blocks(base.model, base.config)
    assert inner is base.model.language_model.layers and path == "language_model.layers"


@pytest.mark.parametrize(
    ("hook", "path", "side"),
    [
        ("model.layers.1.output", "", "output"),
        ("model.layers.1.mlp.output", ".mlp", "output"),
        ("model.layers.1.self_attn.o_proj.input", ".self_attn.o_proj", "input"),
        ("model.layers.1.pre_feedforward_layernorm.output", ".pre_feedforward_layernorm", "output"),
        ("model.layers.1.post_feedforward_layernorm.output", ".post_feedforward_layernorm", "output"),
        ("layers.1.resid_post", "", "output"),
        ("layers.1.mlp_out", ".post_feedforward_layernorm", "output"),
        ("model.language_model.layers.1", "", "output"),
    ],
)
def test_published_places_of_text_models_are_found_in_multimodal_ones(hook, path, side):
    base = gemma_3()
    point = find_hook_point(base, base.config, hook)
    assert (point.path, point.side) == (f"model.language_model.layers.1{path}", side)
    assert point.module is base.get_submodule(point.path)


def test_a_path_that_exists_wins_and_one_into_the_vision_tower_is_not_bent():
    base = gemma_3()
    vision = next(name for name, m in base.named_modules() if name.startswith("model.vision") and name.endswith("s.1"))
    assert find_hook_point(base, base.config, vision).path == vision
    with pytest.raises(ValueError, match=r"Gemma3ForConditionalGeneration \(gemma3_text\).*Received: hook='vision"):
        find_hook_point(base, base.config, "vision_tower.encoder.layers.1.mpl")


@pytest.mark.parametrize("place", [{"layer": 1}, {"hook": "model.layers.1.output"}])
def test_an_sae_in_a_multimodal_base_steers_its_text_blocks(place):
    base = gemma_3()
    ids = prompt()
    sae = tiny_sae(**place)
    with torch.no_grad():
        bare = base(ids, use_cache=False).logits
        model = SaeForCausalLM.from_base(base, saes=[sae])
        assert torch.equal(model(ids, use_cache=False).logits, bare)
        edit = Steering([FeatureEdit(feature=3, op="direction", value=2.0)])
        got = model(ids, steering=edit, use_cache=False).logits
        handle = base.model.language_model.layers[1].register_forward_hook(
            lambda m, args, out: (
                out + 2 * sae.W_dec[3] if torch.is_tensor(out) else (out[0] + 2 * sae.W_dec[3], *out[1:])
            )
        )
        wanted = base(ids, use_cache=False).logits
        handle.remove()
    close(got, wanted)
    got = HiddenStateReader(base, ["layers.1.resid_post"]).read([ids[0]], [torch.arange(9)])["layers.1.resid_post"]
    assert got.shape == (9, WIDTH)


def test_a_base_without_a_number_of_blocks_is_named():
    with pytest.raises(
        ValueError, match=r"No list of None decoder blocks in Linear.*Received: num_hidden_layers=None"
    ):
        config: Any = SimpleNamespace(model_type="odd", get_text_config=lambda: SimpleNamespace(model_type="odd"))
        find_blocks(nn.Linear(2, 2), config)


def test_widths_are_compared_where_a_module_tells_them():
    base = tiny_base()
    with pytest.raises(ValueError, match=r"reads 32 values.*width of 48 \(Linear, model\.layers\.1\.mlp\.up_proj\)"):
        SaeForCausalLM.from_base(base, saes=[tiny_sae(hook="model.layers.1.mlp.up_proj")])
    with pytest.raises(ValueError, match=r"writes 16 values.*width of 32.*Received: d_out=16"):
        SaeForCausalLM.from_base(
            base,
            saes=[
                tiny_sae(
                    hook="model.layers.1.mlp.input", hook_out="layers.1.mlp_out", d_out=16, apply_b_dec_to_input=False
                )
            ],
        )


def test_a_list_of_blocks_comes_before_others_of_its_length():
    """Idefics keeps cross-attentions beside its blocks, in a list whose name sorts first."""
    base = nn.Module()
    base.gated_cross_attn_layers = nn.ModuleList([Block(), Block()])
    base.layers = nn.ModuleList([Block(), Block()])
    assert find_blocks(base, AutoConfig.for_model("llama", num_hidden_layers=2))[1] == "layers"
