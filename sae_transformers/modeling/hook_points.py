"""Where an SAE stands: a site of a block, or any module path, for any decoder.

`resid_pre` and `resid_post` are what a block reads and returns. `mlp_in`, `mlp_act` and `attn_heads` are the inputs of
its MLP (behind the norm), of its MLP's last linear map and of its attention's last linear map (the heads' outputs).

`mlp_out` and `attn_out` are the tensors that a block adds to the residual stream: after the post-norm where the family
has one (Gemma 2 and 3, OLMo 2, GLM 4), and before the addition where the module adds the residual itself (BLOOM, MPT).
Adding to `mlp_out` is adding to `resid_post`, except where a block goes on to change the stream: Gemma 4 adds its
per-layer input and multiplies all by its layer scalar. A family without such a tensor is refused (`hook_families`).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_sparse_autoencoder import SITES
from .hook_families import STREAMS, bert_half, module_of, names_of, refusal_of

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2")
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
# A block with one of these normalises what its MLP or attention returns before adding it.
MLP_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
# With one of these `post_attention_layernorm` is a post-norm; elsewhere it is the norm before the MLP.
OTHER_MLP_NORMS = ("post_feedforward_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm")
# The last linear map inside a module that adds the residual itself (BLOOM, MPT).
BEFORE_RESIDUAL = {"mlp_out": ("dense_4h_to_h", "down_proj"), "attn_out": ("dense",)}
# Names of the last linear map of an MLP and of an attention.
LAST_MAPS = {
    "mlp_act": ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "proj_out"),
    "attn_heads": ("o_proj", "out_proj", "c_proj", "dense", "wo"),
}
# Names of a list of blocks, before all others of its length (Idefics has cross-attentions beside).
BLOCK_LISTS = ("layers", "layer", "h", "blocks", "block")
# What may stand before `layers` in a path of a text decoder; a path into a vision tower is never taken for one.
WRAPPERS = "model|language_model|text_model|decoder|transformer"


class HookPoint(NamedTuple):
    """A module and which of its sides is meant (`input` or `output`)."""

    module: nn.Module
    side: str
    path: str


def find_blocks(base: nn.Module, config: PreTrainedConfig) -> tuple[nn.ModuleList, str]:
    """The decoder blocks of a base model and their path: the shallowest ModuleList of `num_hidden_layers` modules, in
    the text model where there are others (a vision tower may have as many blocks).

    Raises:
        ValueError: there is no such list.
    """
    config = config.get_text_config()
    # BART and its kin: `num_hidden_layers` is the encoder's.
    count = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    for root, prefix in _text_models(base, config):
        found = [
            (name.count("."), name.rpartition(".")[2] not in BLOCK_LISTS, name, module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if found:
            *_, name, blocks = min(found, key=lambda item: item[:3])
            return blocks, f"{prefix}.{name}" if prefix else name
    raise ValueError(
        f"No list of {count} decoder blocks in {type(base).__name__}, as the config of {_family(config)!r} says; give "
        f"`hook`, a module path, in place of `layer`. Received: num_hidden_layers={count!r}."
    )


def _text_models(base: nn.Module, config: PreTrainedConfig) -> list[tuple[nn.Module, str]]:
    """Where the decoder blocks may be, the likeliest first, each with its path."""
    models = [(name, m) for name, m in base.named_modules() if isinstance(m, PreTrainedModel)]
    matching = [(m, name) for name, m in models if _family(m.config) == _family(config)]
    decoder = models[0][1].get_decoder() if models else None
    matching.sort(key=lambda pair: pair[0] is not decoder)
    return [*matching, (base, "")]


def _family(config: Any) -> str:
    return getattr(config, "model_type", "") or type(config).__name__


def find_hook_point(base: nn.Module, config: PreTrainedConfig, place: str) -> HookPoint:
    """Resolve `layers.<n>.<site>` or a module path.

    Args:
        base: the base model (with or without a head).
        config: its config.
        place: as `SparseAutoencoderConfig.read_at` and `write_at` give it.

    Raises:
        ValueError: no such layer, site or module, or the family has no tensor of that meaning.
    """
    config = config.get_text_config()
    parts = place.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdecimal() and parts[2] in SITES:
        return _find_site(base, config, int(parts[1]), parts[2])
    return _find_module(base, config, place)


def _find_site(base: nn.Module, config: PreTrainedConfig, layer: int, site: str) -> HookPoint:
    blocks, path = find_blocks(base, config)
    if layer >= len(blocks):
        raise ValueError(f"`layer` must be in [0, {len(blocks)}) for this base. Received: layer={layer!r}.")
    block, path = blocks[layer], f"{path}.{layer}"
    if reason := refusal_of(block, _family(config), site):
        raise ValueError(_refused(block, path, config, layer, site, reason))
    if site == "resid_pre":
        return HookPoint(block, "input", path)
    if site == "resid_post":
        return HookPoint(block, "output", path)
    side = "output" if site in ("mlp_out", "attn_out") else "input"
    if inner := module_of(block, _family(config), site):
        return HookPoint(block.get_submodule(inner), side, f"{path}.{inner}")
    if side == "input":
        return _find_inside(block, path, site, _family(config))
    name = _added_by(block, site)
    if name is None:
        names = MLP_NAMES if site == "mlp_out" else ATTENTION_NAMES
        raise ValueError(
            f"{type(block).__name__} ({_family(config)}) has none of {', '.join(names)}. Received: site={site!r}, "
            f"layer={layer!r}. Use site='resid_post', or `hook`, a module path; the block has: "
            f"{', '.join(n for n, _ in block.named_children())}."
        )
    module, path = block.get_submodule(name), f"{path}.{name}"
    residual = inspect.signature(module.forward).parameters.get("residual")
    if residual is not None and residual.default is inspect.Parameter.empty:  # an optional one is a fused norm's
        last = next((n for n in BEFORE_RESIDUAL[site] if hasattr(module, n)), None)
        if last is None:
            raise ValueError(
                f"{type(module).__name__} ({_family(config)}) adds the residual itself, and none of its modules is "
                f"known to be the last before that. Received: site={site!r}, layer={layer!r}. Use site='resid_post', "
                f"or `hook`, a module path, as {path + '.' + next((n for n, _ in module.named_children()), '')!r}."
            )
        module, path = getattr(module, last), f"{path}.{last}"
    return HookPoint(module, "output", path)


def _added_by(block: nn.Module, site: str) -> str | None:
    """The path inside a block of the module whose output it adds to its residual stream."""
    if bert_half(block) is not None:  # RoBERTa-PreLayerNorm, Megatron-BERT: its `output` modules add the residual
        return "output.dense" if site == "mlp_out" else "attention.output.dense"
    if site == "mlp_out":
        names = (*MLP_POST_NORMS, *MLP_NAMES)
    else:
        between = ("post_attention_layernorm",) if any(hasattr(block, n) for n in OTHER_MLP_NORMS) else ()
        names = ("post_self_attn_layernorm", *between, *ATTENTION_NAMES)
        if not _named(block, ATTENTION_NAMES):  # a block of another kind, as a recurrent one
            return None
    return _named(block, names)


def _named(block: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if isinstance(getattr(block, n, None), nn.Module)), None)


def _refused(block: nn.Module, path: str, config: Any, layer: int, site: str, reason: str) -> str:
    if site.startswith("resid"):
        what = "one residual stream (batch, seq, width) between blocks"
    elif site in ("mlp_out", "attn_out"):
        what = "the tensor that a block adds to its residual stream, as it is"
    else:
        what = "what one module of a block reads"
    inside = _named(block, ATTENTION_NAMES if site.startswith("attn") else MLP_NAMES)
    hook = f"{path}.{inside}" if inside and not isinstance(getattr(block, inside), nn.ModuleList) else ""
    stream = "" if refusal_of(block, _family(config), "resid_post") else "site='resid_post', or "
    example = f", as hook={hook!r} for what that module returns" if hook else ""
    return (
        f"Site {site!r} stands for {what}; {type(block).__name__} ({_family(config)}) {reason}. Received: "
        f"site={site!r}, layer={layer!r}. Use {stream}`hook`, a module path{example}."
    )


def _find_inside(block: nn.Module, path: str, site: str, family: str) -> HookPoint:
    """The input of a block's MLP, of its last linear map, or of its attention's."""
    if hasattr(block, "fc1") and hasattr(block, "fc2") and site != "attn_heads":  # OPT has no module for its MLP
        name = "fc1" if site == "mlp_in" else "fc2"
        return HookPoint(getattr(block, name), "input", f"{path}.{name}")
    names = ATTENTION_NAMES if site == "attn_heads" else MLP_NAMES
    name = next((n for n in names if isinstance(getattr(block, n, None), nn.Module)), "")
    if name and site == "mlp_in":
        return HookPoint(getattr(block, name), "input", f"{path}.{name}")
    found = [
        (f"{path}.{name}.{inner}", child)
        for inner, child in (getattr(block, name).named_modules() if name else ())
        if inner.rpartition(".")[2] in LAST_MAPS[site]
    ]
    if len(found) == 1 and not hasattr(getattr(block, name), "experts"):  # an expert's map is not the MLP's
        return HookPoint(found[0][1], "input", found[0][0])
    raise ValueError(
        f"{type(block).__name__} ({family}) has no one module for {site}; give `hook`, a module path, in place of "
        f"`site`. Received: site={site!r}. It has: {', '.join(n for n, _ in block.named_modules() if n)}."
    )


def _find_module(base: nn.Module, config: PreTrainedConfig, place: str) -> HookPoint:
    modules = dict(base.named_modules())
    prefix = getattr(base, "base_model_prefix", "")
    paths = [place, f"{prefix}.{place}"]
    if match := re.fullmatch(rf"(?:(?:{WRAPPERS})\.)*layers\.(\d+(?:\..+)?)", place):
        # The path as another class with the same blocks has it: without a head, or beside a vision tower.
        with contextlib.suppress(ValueError):
            paths.append(f"{find_blocks(base, config)[1]}.{match[1]}")
    for path in paths:
        if path in modules and path:
            return _readable(HookPoint(modules[path], "output", path), config)
        stem, _, side = path.rpartition(".")
        if side in ("input", "output") and stem in modules:
            return _readable(HookPoint(modules[stem], side, stem), config)
    close = difflib.get_close_matches(place, [name for name in modules if name], n=3, cutoff=0.4)
    raise ValueError(
        f"No module of that path in {type(base).__name__} ({_family(config)}); close ones: "
        f"{', '.join(close) or 'none'}. Received: hook={place!r}."
    )


def _readable(point: HookPoint, config: Any) -> HookPoint:
    """The point itself; refuses blocks whose states have four dimensions, which an SAE would meet in a forward."""
    for name in names_of(point.module, _family(config)) & set(STREAMS):
        inside = _named(point.module, MLP_NAMES)
        raise ValueError(
            f"An SAE reads (batch, seq, width), and {name} ({_family(config)}) reads and returns {STREAMS[name]}, "
            f"several residual streams. Received: hook={point.path!r}. Use a module inside it, as "
            f"hook={f'{point.path}.{inside}'!r}."
        )
    return point


# -- tensors ---------------------------------------------------------------------------------------------------------


def hook_tensor(point: HookPoint, action: Callable[[Tensor], Tensor]) -> Any:
    """Run `action` on the hidden state at a point whenever its module runs; what it returns takes that place.

    The hidden state is the first floating-point tensor of two dimensions or more: of the arguments, in the order of
    the forward's signature, or of the output, be that a tensor, a tuple (named or not), a ModelOutput or a dict.
    Containers are copied, never changed.

    Args:
        action: from the hidden state to itself, where nothing changes, or to an edited one.

    Returns:
        The handle that removes the hook.
    """
    if point.side == "output":
        return point.module.register_forward_hook(functools.partial(_on_output, action))
    # Read once here: a signature cannot be read while a compiled model is traced.
    names = tuple(inspect.signature(point.module.forward).parameters)
    return point.module.register_forward_pre_hook(functools.partial(_on_input, action, names), with_kwargs=True)


def _on_input(action: Any, names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    if args and isinstance(args[0], Tensor) and _is_state(args[0]):
        edited = action(args[0])
        return None if edited is args[0] else ((edited, *args[1:]), kwargs)
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and _is_state(value):
            edited = action(value)
            return None if edited is value else ((*args[:index], edited, *args[index + 1 :]), kwargs)
    for name in (*names, *kwargs):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and _is_state(value):
            edited = action(value)
            return None if edited is value else (args, {**kwargs, name: edited})
    raise TypeError(_no_state(module, "is given", [*args, *kwargs.values()]))


def _on_output(action: Any, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        edited = action(output)
        return None if edited is output else edited
    if type(output) is tuple and output and isinstance(output[0], Tensor) and _is_state(output[0]):
        edited = action(output[0])
        return None if edited is output[0] else (edited, *output[1:])
    if isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            if isinstance(value, Tensor) and _is_state(value):
                edited = action(value)
                if edited is value:
                    return None
                values = (*output[:index], edited, *output[index + 1 :])
                # A NamedTuple's constructor takes its fields one by one.
                make = getattr(type(output), "_make", type(output))
                return make(values)
        raise TypeError(_no_state(module, "returns", list(output)))
    if isinstance(output, Mapping):  # a ModelOutput too
        for name, value in output.items():
            if isinstance(value, Tensor) and _is_state(value):
                edited = action(value)
                if edited is value:
                    return None
                if isinstance(output, ModelOutput):  # torch 2.9 cannot trace `copy`
                    return type(output)(**{**output, name: edited})
                copied: Any = copy.copy(output)
                copied[name] = edited
                return copied
        raise TypeError(_no_state(module, "returns", list(output.values())))
    raise TypeError(_no_state(module, "returns", [output]))


def _is_state(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1


def _no_state(module: nn.Module, verb: str, values: list) -> str:
    kinds = ", ".join(f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in values)
    return (
        f"An SAE stands where a module {verb} a floating-point tensor (batch, seq, width), and this one has none. "
        f"Received: {type(module).__name__} with {kinds or 'nothing'}. Place the SAE at another module with `layer`, "
        f"`site` or `hook`."
    )
