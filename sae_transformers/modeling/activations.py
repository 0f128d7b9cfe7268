"""Activation functions of sparse autoencoders: pure functions of the pre-activations, with their gradients.

Notation: `pre_acts (..., d_sae)`, any float dtype, never modified. Comparisons with a threshold are strict.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest signed pre-activations of each token, in descending order.

    "Scaling and evaluating sparse autoencoders" (https://huggingface.co/papers/2406.04093), section 2.3. Ties at the
    k-th place are broken by `torch.topk`.

    Returns:
        values (..., k) and indices (..., k) int64.
    """
    values, indices = torch.topk(pre_acts, k, dim=-1)
    return values, indices


def after_top_k(values: Tensor, activation: str) -> Tensor:
    """What becomes of the picked values: `topk` relu, `topk-sigmoid` sigmoid, `topk-tanh` tanh. Shape unchanged."""
    if activation == "topk-sigmoid":
        return torch.sigmoid(values)
    if activation == "topk-tanh":
        return torch.tanh(values)
    return torch.relu(values)


def _jump(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    """relu(pre_acts) * (pre_acts > threshold), in one comparison: nothing below 0 passes either."""
    return torch.where(pre_acts > threshold.clamp(min=0), pre_acts, 0.0)


class _JumpRelu(torch.autograd.Function):
    """JumpReLU with the rectangle-kernel estimate of the threshold's gradient."""

    @staticmethod
    def forward(ctx, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return _jump(pre_acts, threshold)

    @staticmethod
    def backward(ctx, grad_latents: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        pre_acts, threshold = ctx.saved_tensors
        grad_pre = grad_threshold = None
        if ctx.needs_input_grad[0]:
            grad_pre = torch.where((pre_acts > threshold) & (pre_acts > 0), grad_latents, 0.0)
        if ctx.needs_input_grad[1]:
            inside = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(grad_latents.dtype)
            grad_threshold = (-threshold / ctx.bandwidth * inside * grad_latents).sum_to_size(threshold.shape)
        return grad_pre, grad_threshold, None


def jump_relu(pre_acts: Tensor, threshold: Tensor, bandwidth: float = 1e-3) -> Tensor:
    """Keep what exceeds its latent's threshold: `relu(pre_acts) * (pre_acts > threshold)`.

    "Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders"
    (https://huggingface.co/papers/2407.14435), equations 1 and 11.

    Args:
        pre_acts: (..., d_sae).
        threshold: (d_sae,), or () for one threshold for all (BatchTopK at inference).
        bandwidth: width of the kernel that estimates the threshold's gradient, in pre-activation units.

    Returns:
        latents, (..., d_sae).
    """
    if torch.is_grad_enabled() and (pre_acts.requires_grad or threshold.requires_grad):
        return _JumpRelu.apply(pre_acts, threshold, bandwidth)
    return _jump(pre_acts, threshold)


def gated(gate_pre_acts: Tensor, magnitude_pre_acts: Tensor) -> Tensor:
    """`relu(magnitude) where gate > 0`: "Improving dictionary learning with gated sparse autoencoders"
    (https://huggingface.co/papers/2404.16014), equation 3. Both and the result are (..., d_sae)."""
    return torch.where(gate_pre_acts > 0, torch.relu(magnitude_pre_acts), 0.0)
