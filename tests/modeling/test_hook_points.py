"""Places by name: which module each site is, and errors for places that are not there."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.latents.hidden_states import HiddenStateReader
from sae_transformers.modeling.hook_points import HookPoint, find_blocks, find_hook_point, hook_tensor
from tests.covering import fast
from tests.invariants.naive import block_list, site_module
from tests.tiny import ARCHITECTURES, LAYERS, prompt, tiny_base, tiny_sae


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


# -- the tensor at a point -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    weights: Any
    hidden: Tensor


STATE = torch.arange(12.0).view(1, 3, 4)
IDS = torch.tensor([[1, 2, 3]])


class Returns(nn.Module):
    """Returns what it was told to; its forward takes several things under names of its own."""

    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = output

    def forward(self, ids: Any = None, latents: Any = None, context: Any = None, **rest: Any) -> Any:
        return self.output if self.output is not None else (ids, latents, context, rest)


@pytest.mark.parametrize(
    ("output", "at"),
    [
        (STATE, lambda out: out),
        ((STATE, "rest"), lambda out: out[0]),
        ([STATE, "rest"], lambda out: out[0]),
        ((None, IDS, STATE), lambda out: out[2]),
        (Pair(None, STATE), lambda out: out.hidden),
        (BaseModelOutput(last_hidden_state=STATE, hidden_states=(STATE,)), lambda out: out.last_hidden_state),
        (BaseModelOutput(last_hidden_state=STATE, hidden_states=(STATE,)), lambda out: out[0]),
        ({"loss": torch.tensor(1.0), "hidden": STATE, "other": STATE}, lambda out: out["hidden"]),
        (defaultdict(int, {"hidden": STATE}), lambda out: out["hidden"]),
    ],
    ids=["tensor", "tuple", "list", "later", "named", "field", "item", "dict", "defaultdict"],
)
def test_outputs_of_every_kind_are_edited_in_a_copy(output, at):
    module = Returns(output)
    handle = hook_tensor(HookPoint(module, "output", "m"), lambda hidden: hidden + 1)
    edited = module()
    assert torch.equal(at(edited), STATE + 1) and type(edited) is type(output) and edited is not output
    assert torch.equal(at(output), STATE)
    if not isinstance(output, Tensor):
        assert len(edited) == len(output)
    handle.remove()
    seen = []
    hook_tensor(HookPoint(module, "output", "m"), lambda hidden: (seen.append(hidden), hidden)[1])
    assert module() is output and seen[0] is STATE  # nothing is copied where nothing changes


def test_inputs_under_any_name_are_edited():
    module = Returns()
    hook_tensor(HookPoint(module, "input", "m"), lambda hidden: hidden + 1)
    for args, kwargs in (
        ((IDS, STATE), {"context": STATE}),
        ((IDS,), {"context": STATE, "latents": STATE}),  # by the signature's order, not the call's
        ((), {"mask": 3, "context": STATE, "latents": STATE}),
        ((None, STATE, STATE), {}),
    ):
        _, latents, context, _ = module(*args, **kwargs)
        assert torch.equal(latents, STATE + 1) and torch.equal(context, STATE)
    assert torch.equal(module(unknown=STATE)[3]["unknown"], STATE + 1)


def test_a_module_without_a_hidden_state_is_named():
    for output, shown in (((IDS,), r"torch\.int64 \(1, 3\)"), ("text", "str"), ((None,), "NoneType"), ({}, "nothing")):
        module = Returns(output)
        hook_tensor(HookPoint(module, "output", "m"), lambda hidden: hidden)
        with pytest.raises(
            TypeError, match=f"returns a floating-point tensor.*Received: Returns with {shown}.*`hook`"
        ):
            module()
    module = Returns()
    hook_tensor(HookPoint(module, "input", "m"), lambda hidden: hidden)
    with pytest.raises(TypeError, match="is given a floating-point tensor"):
        module(IDS)


class Named(nn.Module):
    """An attention that returns a NamedTuple, whose argument has a name of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Pair:
        return Pair("weights", self.inner(x))


class Unpacks(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.named = Named(inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.named(x=hidden_states).hidden


@pytest.mark.parametrize("hook", ["model", "model.layers.1.mlp.named", "model.layers.1.mlp.named.input"])
def test_an_sae_works_at_unusual_modules(hook):
    works_at_an_unusual_module(hook, compiled=False)


@pytest.mark.parametrize("hook", fast(["model", "model.layers.1.mlp.named", "model.layers.1.mlp.named.input"],
                                       "model.layers.1.mlp.named"))  # fmt: skip
def test_an_sae_works_at_unusual_modules_compiled(hook):
    works_at_an_unusual_module(hook, compiled=True)


def works_at_an_unusual_module(hook: str, compiled: bool) -> None:
    base = tiny_base()
    base.model.layers[1].mlp = Unpacks(base.model.layers[1].mlp)
    module = {"model": "model.norm", "model.layers.1.mlp.named": "model.layers.1.mlp.named.inner"}.get(hook)
    sae = tiny_sae(hook=hook)
    plain = base(prompt(), use_cache=False).logits
    model = SaeForCausalLM.from_base(base, saes=[sae])
    edit = Steering([FeatureEdit(feature=3, op="direction", value=2.0)])
    with torch.no_grad():
        assert torch.equal(model(prompt(), use_cache=False).logits, plain)
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        steered = run(prompt(), steering=model.prepare_steering(edit), use_cache=False).logits
        v = 2 * sae.W_dec[3]
        if module is None:
            handle = base.model.layers[1].mlp.named.inner.register_forward_pre_hook(lambda m, args: (args[0] + v,))
        else:
            handle = base.get_submodule(module).register_forward_hook(lambda m, args, out: out + v)
        expected = base(prompt(), use_cache=False).logits
        handle.remove()
    assert (steered - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(steered, plain)
    read = HiddenStateReader(base, [hook]).read(list(prompt()), [torch.arange(9)] * 2)[hook]
    with torch.no_grad():
        seen = model(prompt(), output_sae_inputs=True, use_cache=False).sae_inputs[0]
    assert torch.allclose(read, seen.reshape(-1, 32), atol=1e-5)
