"""The SAEs' share of a pass as one opaque operator: a compiled graph calls it and never looks inside.

The graph is cut there (`splitting_ops`), so that what is decided on the host, whose tokens are steered, is not frozen
into a captured CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .steps import Steps

STEER = "sae_transformers::steer"
# By the name of the model's instance: one process may hold several engines.
STEPS: dict[str, Steps] = {}


def register_steps(steps: Steps, prefix: str) -> str:
    """The name under which the operator finds a model's steps. It is a constant of compiled graphs, which are kept
    over starts: the same in every process that makes its models in the same order."""
    name = f"{prefix or 'model'}#{len(STEPS)}"
    STEPS[name] = steps
    return name


@torch.library.custom_op(STEER, mutates_args=())
def steer(hidden: Tensor, target: Tensor, name: str, number: int) -> Tensor:
    """`Steps.apply` of SAE `number` of the model `name`, a new tensor (T, d_out) in any case."""
    edited = STEPS[name].apply(number, hidden, target)
    return edited.clone() if edited is target or edited is hidden else edited


@steer.register_fake
def _(hidden: Tensor, target: Tensor, name: str, number: int) -> Tensor:
    return torch.empty_like(target)
