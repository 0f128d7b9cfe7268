"""Which steering adds the same vectors to the residual stream at every token, and what they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ....modeling import SaeForCausalLM, Steering
from ....modeling.hook_points import find_blocks, find_hook_point

ADDS = ("direction", "add")
# Fields that say what is added, and what was measured of it; any other one restricts or changes it.
OF_STEERING = ("edits", "receipt")
OF_EDIT = ("sae", "feature", "op", "value", "unit")
PER_TOKEN = ("layer_norm", "constant_norm")


def constant_vectors(model: SaeForCausalLM, steering: Steering) -> dict[int, Tensor]:
    """What a steering adds behind each block, at every token.

    Exact are edits of op `direction`, and of op `add` where the SAE does not rescale each token, in the units
    `absolute` and `max`, of SAEs that write at `resid_post`. Those at one block are summed, in float64.

    Args:
        model: an `SaeForCausalLM`; it is not run.
        steering: what it is steered with.

    Returns:
        index of the block, from 0 -> (d_model,), float32, on the CPU.

    Raises:
        ValueError: it is not of this kind; the message names the field.
    """
    if not steering:
        raise ValueError("Expected a steering that changes something. Received: no edit.")
    for field in dataclasses.fields(steering):
        value = getattr(steering, field.name)
        everywhere = field.name == "positions" and steering.bounds == ((None, None),)
        if field.name not in OF_STEERING and not everywhere and value != field.default:
            raise _refused(field.name, value, field.default)
    for number, edit in enumerate(steering.edits):
        _check_edit(edit, f"edits[{number}]")
    model.prepare_steering(steering)  # numbers, names and maxima that are not there
    found: dict[int, Tensor] = {}
    for number, edit in enumerate(steering.feature_edits):
        sae = model.saes[edit.sae]
        config = sae.config
        if edit.op == "add" and config.normalize_output and config.normalization in PER_TOKEN:
            raise ValueError(
                f"What is exported is the same vector at every token, and an SAE with {config.normalization} scales "
                f"what `add` writes by the token. Expected op='direction'. Received: edits[{number}].op='add'."
            )
        layers = [_block_behind(model, place, edit.sae) for place in config.writes_at]
        feature = config.resolve_feature(edit.feature)
        row = sae.W_dec[feature].detach().to("cpu", torch.float64)  # (places * d_model,)
        value = float(edit.value or 0.0)
        if edit.unit == "max":
            value *= float(sae.feature_max[feature])
        if edit.op == "add" and config.normalize_output and config.normalization == "scalar":
            value /= config.output_scale or config.input_scale
        for layer, part in zip(layers, row.chunk(len(layers)), strict=True):
            found[layer] = found.get(layer, torch.zeros_like(part)) + value * part
    return {layer: found[layer].float() for layer in sorted(found)}


def _check_edit(edit: Any, name: str) -> None:
    if not hasattr(edit, "op"):
        raise ValueError(
            f"What is exported is the same vector at every token, and a re-weighting reads each token's code. "
            f"Expected edits of op {' or '.join(map(repr, ADDS))}. Received: {name}.mode={edit.mode!r}."
        )
    if edit.op not in ADDS:
        raise ValueError(
            f"What is exported is the same vector at every token, and this op reads the token's latent. Expected "
            f"{' or '.join(map(repr, ADDS))}. Received: {name}.op={edit.op!r}."
        )
    if edit.unit == "norm":
        raise ValueError(
            f"What is exported is the same vector at every token, and the unit `norm` follows each token's norm. "
            f"Expected 'absolute' or 'max'. Received: {name}.unit={edit.unit!r}."
        )
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if field.name not in OF_EDIT and value != field.default:
            raise _refused(f"{name}.{field.name}", value, field.default)


def _refused(name: str, value: Any, default: Any) -> ValueError:
    return ValueError(
        f"What is exported is added to every token, always, and nothing else is done. Expected "
        f"{name.rpartition('.')[2]}={default!r}. Received: {name}={value!r}."
    )


def _block_behind(model: SaeForCausalLM, place: str, number: int) -> int:
    """The index of the block whose output is written."""
    config: Any = model.config.text_config
    point = find_hook_point(model.lm, config, place)
    blocks, _ = find_blocks(model.lm, config)
    for index, block in enumerate(blocks):
        if block is point.module and point.side == "output":
            return index
    raise ValueError(
        f"What is exported is added to what a block returns. Expected SAEs that write at 'layers.<n>.resid_post'. "
        f"Received: SAE {number}, which writes at {place!r}."
    )
