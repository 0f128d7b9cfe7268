"""Which base an adapter-sized checkpoint was made with: another one of the same shape would load, and be steered by
SAEs that do not fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

TENSORS, VALUES = 6, 4
# Of the largest sampled value of a tensor: half precision rounds, and 8-bit weights that were dequantised do more.
TOLERANCE = 0.05


def base_fingerprint(base: nn.Module) -> dict[str, list[float]]:
    """A few values of a few of the body's matrices, by name. Cheap, whatever the base's size; matrices whose values
    are not at hand (offloaded, quantised) are left out."""
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    body = f"{getattr(base, 'base_model_prefix', '')}."
    if any(name.startswith(body) for name in shapes):  # heads are new where a base has none
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(body)}
    matrices = [
        name for name, shape in shapes.items() if len(shape) == 2 and min(shape) >= VALUES and "lora_" not in name
    ]
    found = {name: _values(base, name) for name in matrices[:: max(1, len(matrices) // TENSORS)][:TENSORS]}
    return {name: values for name, values in found.items() if values is not None}


def is_at_hand(parameter: nn.Parameter) -> bool:
    """Whether a parameter's values can be read: not where it is offloaded or quantised."""
    plain = type(parameter.data) is Tensor and parameter.is_floating_point()
    return plain and parameter.device.type != "meta"


def _values(base: nn.Module, name: str) -> list[float] | None:
    parameter = base.get_parameter(name)
    return sampled_values(parameter) if is_at_hand(parameter) and parameter.ndim == 2 else None


def sampled_values(parameter: Tensor) -> list[float]:
    """A few values of a matrix."""
    rows = torch.linspace(0, parameter.shape[0] - 1, VALUES).long()
    columns = torch.linspace(0, parameter.shape[1] - 1, VALUES).long()
    found = parameter.detach()[rows.to(parameter.device), columns.to(parameter.device)]
    return [float(f"{value:.4g}") for value in found.float().tolist()]


def differing(expected: Mapping[str, list[float]], base: nn.Module) -> str | None:
    """A parameter in which `base` is not the one that `expected` was taken of; None where none is found."""
    for name, values in expected.items():
        try:
            found = _values(base, name)
        except AttributeError:  # quantised layers name and pack their tensors otherwise
            continue
        if found is None:
            continue
        if differing_values(values, found):
            return name
    return None


def differing_values(expected: Sequence[float], found: Sequence[float]) -> bool:
    """Whether sampled values are of another matrix, and not the same one rounded."""
    scale = max(map(abs, expected))
    return any(abs(one - other) > TOLERANCE * scale for one, other in zip(expected, found, strict=True))
