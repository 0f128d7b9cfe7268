"""An optimiser's step on SAEs with fewer passes over their weights: how they lie in memory, what need not be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...modeling import SparseAutoencoder


@contextmanager
def stored_by_latent(saes: Sequence[SparseAutoencoder]) -> Iterator[None]:
    """Encoders with the numbers of a latent side by side in memory, as their gradient comes."""
    encoders = [sae.W_enc for sae in saes if not sae.config.tied]
    for encoder in encoders:
        encoder.data = encoder.data.T.contiguous().T
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.data = encoder.data.contiguous()


def step_on_rows(optimizer: torch.optim.Optimizer) -> None:
    """Let a fused Adam on the CPU take matrices that are stored by column for what lies in memory, their transposes.

    Its kernel would copy such a matrix and its gradient first, and goes wrong where moments from a file are stored
    otherwise than their parameter (torch 2.13). Before each step parameters, gradients and moments are transposed,
    without a move in memory, and after it they are as before.
    """
    if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults.get("fused"):  # AdamW is one
        turned: list[nn.Parameter] = []

        def turn_stored_by_column(optimizer: torch.optim.Optimizer, *_: object) -> None:
            turned.extend(p for group in optimizer.param_groups for p in group["params"] if _stored_by_column(p))
            _transpose(optimizer, turned)
            for moments in (optimizer.state.get(parameter, {}) for parameter in turned):
                moments.update({name: value.contiguous() for name, value in moments.items()})

        def turn_back(optimizer: torch.optim.Optimizer, *_: object) -> None:
            _transpose(optimizer, turned)
            turned.clear()

        optimizer.register_step_pre_hook(turn_stored_by_column)
        optimizer.register_step_post_hook(turn_back)


def _stored_by_column(parameter: Tensor) -> bool:
    on_cpu = parameter.device.type == "cpu" and parameter.grad is not None
    return on_cpu and parameter.dim() == 2 and not parameter.is_contiguous() and parameter.T.is_contiguous()


def _transpose(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        shape, parameter.data = parameter.shape, parameter.data.T
        parameter.grad = None if gradient is None else gradient.T
        moments = optimizer.state.get(parameter, {})
        for name, value in moments.items():
            # An optimiser's first step makes its moments, in the shape that the parameter has then.
            if isinstance(value, Tensor) and value.shape == shape:
                moments[name] = value.T


def clip(parameters: Iterable[Tensor], largest_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, but gradients whose norm is within the limit are not multiplied by 1.

    Returns:
        The norm of all gradients, ().
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if not bool(largest_norm / (norm + 1e-6) >= 1):  # NaN, too
        nn.utils.clip_grads_with_norm_(with_gradient, largest_norm, norm)
    return norm
