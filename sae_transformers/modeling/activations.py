"""Activation functions of sparse autoencoders: pure functions of the pre-activations, with their gradients.

Notation: `pre_acts (..., d_sae)`, any float dtype, never modified. Comparisons with a threshold are strict, and ask
what does not pass: a NaN stays one in every activation, so that a damaged hidden state cannot be taken for one
without active latents.
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


def select(pre_acts: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """The `k` latents of each token that an activation of the top-k family keeps.

    The `k` largest signed pre-activations, but: `abs_topk` the `k` largest magnitudes; `groupmax` the largest of each
    of `k` equal groups of neighbours (sparsify, https://github.com/EleutherAI/sparsify).

    Returns:
        pre-activations (..., k), signed, and indices (..., k) int64.
    """
    if activation == "abs_topk":
        indices = torch.topk(pre_acts.abs(), k, dim=-1).indices
        return pre_acts.gather(-1, indices), indices
    if activation == "groupmax":
        values, within = pre_acts.unflatten(-1, (k, -1)).max(dim=-1)
        size = pre_acts.shape[-1] // k
        return values, within + torch.arange(0, k * size, size, device=within.device)
    return top_k(pre_acts, k)


def after_top_k(values: Tensor, activation: str) -> Tensor:
    """What becomes of the picked values: `topk` and `groupmax` relu, `topk-sigmoid` sigmoid, `topk-tanh` tanh,
    `topk-identity` and `abs_topk` nothing. Shape unchanged."""
    if activation == "topk-sigmoid":
        return torch.sigmoid(values)
    if activation == "topk-tanh":
        return torch.tanh(values)
    return values if activation in ("topk-identity", "abs_topk") else torch.relu(values)


def _jump(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    """relu(pre_acts) * (pre_acts > threshold), in one comparison: nothing below 0 passes either."""
    return torch.where(pre_acts <= threshold.clamp(min=0), 0.0, pre_acts)


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
            grad_pre = torch.where((pre_acts <= threshold) | (pre_acts <= 0), 0.0, grad_latents)
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
    return torch.where(gate_pre_acts <= 0, 0.0, torch.relu(magnitude_pre_acts))
