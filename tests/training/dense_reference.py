"""The training objective done the plain way, to compare the library with: dense tensors and autograd, nothing shared.

SAEs are read as bags of weights and config fields. The estimated gradients of a JumpReLU's threshold are added as
terms that are 0 in value: `c * (threshold - threshold.detach())` has the gradient c.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def nl2(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean(-1) / (target**2).mean(-1)


def normalized(c: Any, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """(normalised, scale, mean): the decoder's output times scale plus mean has the units of `x`."""
    if c.normalization == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = torch.sqrt(((x - mean) ** 2).sum(-1, keepdim=True) / (x.shape[-1] - 1))
        return (x - mean) / (std + c.layer_norm_eps), std, mean
    if c.normalization == "constant_norm":
        scale = torch.sqrt((x**2).sum(-1, keepdim=True) / x.shape[-1])
        return x / scale, scale, 0.0
    if c.normalization == "scalar":
        return x * c.input_scale, 1 / (c.output_scale or c.input_scale), 0.0
    return x, 1.0, 0.0


def kept(pre: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """Mask of the k largest of each row, of the latents that the mask `among` names."""
    allowed = pre.detach() if among is None else pre.detach().masked_fill(~among, -torch.inf)
    rank = allowed.argsort(-1, descending=True).argsort(-1)
    return (rank < k) & (allowed > -torch.inf)


def dense_terms(
    sae: Any,
    args: Any,
    hidden: Tensor,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    aux_dead: Tensor | None = None,
    finetune_dead: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every weighted term, (n_tokens,) each, as the objective has them in training."""
    c, p = sae.config, dict(sae.named_parameters())
    target, k = hidden if target is None else target, c.k or 0
    x, scale, mean = normalized(c, hidden)
    W_dec, b_dec = p["W_dec"], p["b_dec"]
    W_enc = W_dec.t() if c.tied else p["W_enc"]
    linear = (x - b_dec if c.apply_b_dec_to_input else x) @ W_enc
    pre = linear + p["b_gate" if c.activation == "gated" else "b_enc"]

    def output(latents: Tensor, decoder: Tensor = W_dec, bias: Tensor = b_dec) -> Tensor:
        found = (latents @ decoder + bias) * scale + mean
        return found + hidden @ p["W_skip"].t() if c.skip_connection else found

    distance = nl2 if args.reconstruction_loss == "normalized_mse" else lambda a, b: ((a - b) ** 2).mean(-1)
    if args.finetune_dead:
        after = (
            (lambda v: v)
            if args.finetune_legacy
            else {"topk-sigmoid": torch.sigmoid, "topk-tanh": torch.tanh}.get(c.activation, torch.relu)
        )
        assert finetune_dead is not None
        first = output(after(pre) * kept(pre, k, ~finetune_dead))
        second = after(pre) * kept(pre, k, finetune_dead) @ W_dec
        second = (second + b_dec if args.finetune_legacy else second) * scale
        terms = {"reconstruction": distance(first, target)}
        if finetune_dead.any():
            terms["dead_residual"] = args.dead_residual_weight * distance(second, (target - first).detach())
        return terms

    sparsity = gate = None
    if c.activation.startswith("topk"):
        chosen = kept(pre, k)
        after = {"topk": torch.relu, "topk-sigmoid": torch.sigmoid, "topk-tanh": torch.tanh}[c.activation]
        z = torch.where(chosen, after(pre), 0.0)
    elif c.activation == "batch_topk":
        flat = pre.detach().flatten()
        lowest = flat.sort(descending=True).values[k * len(x) - 1]
        chosen = (pre >= lowest) & (pre > 0)
        z = pre * chosen
    elif c.activation == "jumprelu":
        threshold, width = p["threshold"], args.jumprelu_bandwidth
        near = ((pre - threshold).detach().abs() < width / 2).to(pre)
        move = threshold - threshold.detach()
        active = (pre > threshold).to(pre)
        z = pre * (active * (pre > 0)).detach() - threshold.detach() / width * near * move
        sparsity = (active - near / width * move).sum(-1)
        chosen = pre > threshold - width / 2
    elif c.activation == "gated":
        magnitude = linear * p["r_mag"].exp() + p["b_mag"]
        chosen = pre > 0
        z = torch.where(chosen, torch.relu(magnitude), 0.0)
        sparsity = torch.relu(pre).sum(-1)
        gate = distance((torch.relu(pre) @ W_dec.detach() + b_dec.detach()) * scale + mean, target)
    elif c.activation == "relu":
        chosen, z = pre > 0, torch.relu(pre)
        sparsity = (z * torch.sqrt((W_dec**2).sum(-1))).sum(-1) / torch.sqrt((hidden**2).sum(-1))
    else:
        chosen, z = torch.ones_like(pre, dtype=torch.bool), pre

    prefixes = args.matryoshka_prefixes or [c.d_sae]
    outputs = [output(z[:, :m], W_dec[:m]) for m in prefixes]
    terms = {"reconstruction": torch.stack([distance(o, target) for o in outputs]).sum(0)}
    if args.sparsity_coefficient and sparsity is not None:
        terms["sparsity"] = args.sparsity_coefficient * sparsity
    if gate is not None:
        terms["gate"] = gate
    if args.aux_k and aux_dead is not None and aux_dead.any():
        after = {"topk-sigmoid": torch.sigmoid, "topk-tanh": torch.tanh}.get(c.activation, torch.relu)
        aux = after(pre) * kept(pre, args.aux_k, aux_dead)
        terms["aux"] = args.aux_coefficient * nl2(aux @ W_dec * scale, (target - outputs[-1]).detach())
    if labels is None or not c.concepts:
        return terms
    a = pre[:, list(c.concepts.values())]
    y = labels.clamp(min=0) if args.conditioning_legacy else labels
    if args.conditioning_weight and args.pos_weight:
        w = 1 + (args.pos_weight - 1) * (y > 0).to(a)
        bce = -(y * F.logsigmoid(a) + (1 - y) * F.logsigmoid(-a))
        if args.conditioning_legacy:
            terms["reconstruction"] = terms["reconstruction"] * w[:, 0]
        terms["conditioning"] = args.conditioning_weight * torch.where(y < 0, 0.0, w * bce).sum(-1)
    if args.ranking_weight:
        last = pre.detach().masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
        short = torch.relu(last + args.ranking_margin - a) * (y > 0)
        terms["ranking"] = args.ranking_weight * torch.where(last < math.inf, short, 0.0).sum(-1)
    return terms


def gradients(sae: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; zeros where there is none."""
    sae.zero_grad(set_to_none=True)
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}
