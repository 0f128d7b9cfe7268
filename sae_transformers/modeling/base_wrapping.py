"""How a base is taken into a model: who trains, where SAEs run, and whether it is still the base that it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .base_fingerprint import is_at_hand
from .hook_points import find_hook_point


def adopt(model: Any, base: Any) -> None:
    """Take over what belongs to the base as a whole, and put each SAE where its block runs."""
    if model.config.weights_scope == "sae":
        for name, parameter in model.lm.named_parameters():
            if not model._is_head(name):
                parameter.requires_grad_(False)
        model._base_corners = corners(model.lm)
    if model.can_generate() and getattr(base, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(base.generation_config)  # not one object for two models
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    for number in range(len(model.saes)):
        device = device_at(model, number)
        if device.type == "meta":  # a base without weights, to be saved as a pointer: the SAEs have theirs
            device = model.saes[number].device
        model.saes[number].to(device=device, dtype=dtype)
    if hasattr(base, "hf_device_map"):
        places = {f"saes.{n}": str(device_at(model, n)) for n in range(len(model.saes))}
        model.hf_device_map = {**{f"lm.{k}" if k else "lm": v for k, v in base.hf_device_map.items()}, **places}
    model.train(base.training)


def device_at(model: Any, number: int) -> torch.device:
    """Where the module runs that an SAE writes to, wherever its weights wait."""
    entry = model.config.sae_configs[number]
    module = find_hook_point(model.lm, model.config.text_config, entry.writes_at[0]).module
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if p.device.type != "meta"), model.device)


# -- whether an adapter-sized checkpoint can hold what there is -------------------------------------------------------


def corners(base: nn.Module) -> dict[str, Tensor]:
    """A corner of each matrix, by name: four values of a merged LoRA's product change with all others."""
    return {name: found for name, p in base.named_parameters() if (found := _corner(p)) is not None}


def _corner(parameter: nn.Parameter) -> Tensor | None:
    """None for a vector, and for values that are not at hand."""
    if parameter.ndim < 2 or not is_at_hand(parameter):
        return None
    return parameter.detach()[(slice(0, 2),) * parameter.ndim].clone()


def check_unchanged(model: Any) -> None:
    """Raises a ValueError if the base that a pointer names is not what runs; warns where it may come to that."""
    if model.config.base_model_name_or_path is None:
        warnings.warn(
            "The base has no name, so this adapter-sized checkpoint will need `base_model=` to load. "
            "Set `config.base_model_name_or_path`, or save with `config.weights_scope = 'full'`.",
            stacklevel=4,
        )
    parameters = dict(model.lm.named_parameters())
    trained = [n for n, p in parameters.items() if p.requires_grad and not model._is_head(n) and "lora_" not in n]
    if trained:
        warnings.warn(
            f"{len(trained)} base parameters are trainable ({trained[0]}, ...) and will not be saved, since "
            f"weights_scope is 'sae'. Set `config.weights_scope = 'full'` to save them.",
            stacklevel=4,
        )
    if getattr(model, "_resized", False):
        raise ValueError(
            "The embeddings were resized, which an adapter-sized checkpoint cannot hold. Set "
            "`config.weights_scope = 'full'`."
        )
    changed = [
        name
        for name, values in getattr(model, "_base_corners", {}).items()
        if (parameter := parameters.get(name)) is not None
        and not (parameter.requires_grad or model._is_head(name))
        and not _same(values, _corner(parameter))
    ]
    if changed:
        raise ValueError(
            f"The base is not what it was when the SAEs were put into it, which an adapter-sized checkpoint cannot "
            f"hold. Expected its weights unchanged. Received: {len(changed)} changed ({changed[0]}, ...), as "
            f"`merge_and_unload()` of a LoRA does. Set `config.weights_scope = 'full'`, or save the LoRA by itself "
            f"before it is merged."
        )


def _same(before: Tensor, now: Tensor | None) -> bool:
    """Whether values are what they were, perhaps rounded on the way by half precision."""
    if now is None or now.shape != before.shape:
        return True  # not at hand any more; other shapes are refused when they are loaded
    before, now = before.to(now.device), now.to(torch.promote_types(now.dtype, before.dtype))
    rounded = (before, before.to(torch.bfloat16), before.to(torch.float16))
    return any(torch.equal(one.to(now.dtype), now) for one in rounded)
