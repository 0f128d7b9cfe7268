"""Where an SAE stands: a site of a block, or any module path, for any decoder.

`resid_pre` and `resid_post` are what a block reads and returns. `mlp_in`, `mlp_act` and `attn_heads` are the inputs of
its MLP (behind the norm), of its MLP's last linear map and of its attention's last linear map (the heads' outputs).

`mlp_out` and `attn_out` are the tensors that a block adds to the residual stream: after the post-norm where the family
has one (Gemma 2 and 3, OLMo 2, GLM 4), and before the addition where the module adds the residual itself (BLOOM).
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from .configuration_sae import SITES

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2")
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
# A block with one of these normalises what its MLP or attention returns before adding it.
MLP_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
ATTENTION_POST_NORMS = {
    "post_feedforward_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_self_attn_layernorm",
}
# The last linear map inside a module that adds the residual itself (BLOOM).
PROJECTION_BEFORE_RESIDUAL = {"mlp_out": "dense_4h_to_h", "attn_out": "dense"}
# Names of the last linear map of an MLP and of an attention.
LAST_MAPS = {
    "mlp_act": ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "proj_out"),
    "attn_heads": ("o_proj", "out_proj", "c_proj", "dense", "wo"),
}


class HookPoint(NamedTuple):
    """A module and which of its sides is meant (`input` or `output`)."""

    module: nn.Module
    side: str
    path: str


def find_blocks(base: nn.Module, config: PreTrainedConfig) -> tuple[nn.ModuleList, str]:
    """The decoder blocks of a base model and their path: its shallowest ModuleList of `num_hidden_layers` modules."""
    count = getattr(config, "num_hidden_layers", None)
    found = [
        (name.count("."), name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise ValueError(
            f"No list of {count} decoder blocks in {type(base).__name__}; give `hook`, a module path, in place of "
            f"`layer`."
        )
    _, name, blocks = min(found, key=lambda item: item[:2])
    return blocks, name


def find_hook_point(base: nn.Module, config: PreTrainedConfig, place: str) -> HookPoint:
    """Resolve `layers.<n>.<site>` or a module path.

    Args:
        base: the base model (with or without a head).
        config: its config.
        place: as `SparseAutoencoderConfig.read_at` and `write_at` give it.

    Raises:
        ValueError: no such layer, site or module.
    """
    parts = place.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[2] in SITES:
        return _find_site(base, config, int(parts[1]), parts[2])
    return _find_module(base, config, place)


def _find_site(base: nn.Module, config: PreTrainedConfig, layer: int, site: str) -> HookPoint:
    blocks, path = find_blocks(base, config)
    if layer >= len(blocks):
        raise ValueError(f"`layer` must be in [0, {len(blocks)}) for this base. Received: layer={layer!r}.")
    block, path = blocks[layer], f"{path}.{layer}"
    if site == "resid_pre":
        return HookPoint(block, "input", path)
    if site == "resid_post":
        return HookPoint(block, "output", path)
    if site in ("mlp_in", *LAST_MAPS):
        return _find_inside(block, path, site)
    post_norm = next((name for name in MLP_POST_NORMS if hasattr(block, name)), None)
    if site == "mlp_out":
        names = ((post_norm,) if post_norm else ()) + MLP_NAMES
    else:
        after = ATTENTION_POST_NORMS.get(post_norm or "")
        names = ((after,) if after and hasattr(block, after) else ()) + ATTENTION_NAMES
    name = next((n for n in names if isinstance(getattr(block, n, None), nn.Module)), None)
    if name is None:
        raise ValueError(
            f"{type(block).__name__} has none of {', '.join(names)}; give `hook`, a module path, in place of "
            f"site={site!r}. "
            f"It has: {', '.join(n for n, _ in block.named_children())}."
        )
    module, path = getattr(block, name), f"{path}.{name}"
    if "residual" in inspect.signature(module.forward).parameters:
        name = PROJECTION_BEFORE_RESIDUAL[site]
        module, path = getattr(module, name), f"{path}.{name}"
    return HookPoint(module, "output", path)


def _find_inside(block: nn.Module, path: str, site: str) -> HookPoint:
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
        f"{type(block).__name__} has no one module for {site}; give `hook`, a module path, in place of "
        f"site={site!r}. It has: {', '.join(n for n, _ in block.named_modules() if n)}."
    )


def _find_module(base: nn.Module, config: PreTrainedConfig, place: str) -> HookPoint:
    modules = dict(base.named_modules())
    prefix = getattr(base, "base_model_prefix", "")
    paths = [place, f"{prefix}.{place}"]
    if match := re.fullmatch(r"(?:.*\.)?layers\.(\d+(?:\..+)?)", place):
        # The path as another class with the same blocks has it: without a head, or beside a vision tower.
        with contextlib.suppress(ValueError):
            paths.append(f"{find_blocks(base, config)[1]}.{match[1]}")
    for path in paths:
        if path in modules and path:
            return HookPoint(modules[path], "output", path)
        stem, _, side = path.rpartition(".")
        if side in ("input", "output") and stem in modules:
            return HookPoint(modules[stem], side, stem)
    close = difflib.get_close_matches(place, [name for name in modules if name], n=3, cutoff=0.4)
    raise ValueError(
        f"No module of that path in {type(base).__name__}; close ones: {', '.join(close) or 'none'}. Received: "
        f"hook={place!r}."
    )
