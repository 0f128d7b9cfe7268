"""The states of a reference model at the places that SAEs read: this model without its adapters, or another one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .call_record import CallRequest, StopForward
from .hook_points import find_hook_point, hook_tensor


def reference_states(model: Any, numbers: Collection[int], inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Number of each SAE -> what it reads in the reference model, (batch, seq, d_in), without a gradient.

    The reference is that of `model.set_penalty_reference` where one is set; else the model itself with PEFT's adapters
    switched off. Dropout is off, and nothing is steered.

    Raises:
        ValueError: there is neither.
    """
    other = model._reference[0] if model._reference else None
    inputs = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    inputs |= {"use_cache": False, "return_dict": True}
    base = model.lm if other is None else other
    if other is None and not _adapters(base):
        raise ValueError(
            "A penalty with goal='reference' needs a model to compare with. Expected a LoRA on this model "
            "(`peft.get_peft_model`), whose base is the reference, or `model.set_penalty_reference(...)` with a "
            "copy of the base; merged adapters cannot be switched off. Received: neither."
        )
    with torch.no_grad(), _as_it_was(base):
        return _states_at(model, base, numbers, inputs)


def _states_at(model: Any, base: nn.Module, numbers: Collection[int], inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    source = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    request = CallRequest(batch_size=source.shape[0], length=source.shape[1])
    found: dict[int, Tensor] = {}
    handles = []

    def keep(number: int, hidden: Tensor) -> Tensor:
        found[number] = request.shaped(hidden).detach()
        if len(found) == len(numbers):
            raise StopForward
        return hidden

    previous = model._slot.swap(None)  # this model's own hooks have nothing to do
    try:
        for number in numbers:
            config = base.config.get_text_config().get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            point = find_hook_point(base, config, model.config.sae_configs[number].read_at)
            handles.append(hook_tensor(point, lambda hidden, number=number: keep(number, hidden)))
        base(**model.base_arguments.of_new_tokens(inputs))
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
        model._slot.swap(previous)
    return found


def _adapters(base: nn.Module) -> list[Any]:
    """Layers that PEFT adapts and has not merged, by attribute: it need not be installed."""
    layers: list[Any] = [m for m in base.modules() if hasattr(m, "_disable_adapters") and hasattr(m, "active_adapter")]
    return [layer for layer in layers if not getattr(layer, "merged", False)]


@contextmanager
def _as_it_was(base: nn.Module) -> Iterator[None]:
    """Without adapters and dropout. PEFT's own switch would change which parameters are trained."""
    training = [module for module in base.modules() if module.training]
    switched = [layer for layer in _adapters(base) if not layer._disable_adapters]
    try:
        for layer in switched:
            layer._disable_adapters = True
        for module in training:
            module.training = False
        yield
    finally:
        for layer in switched:
            layer._disable_adapters = False
        for module in training:
            module.training = True
