"""From normalised hidden states to the chosen latents of a sparse autoencoder, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling import SparseAutoencoder
from ...modeling.activations import after_top_k, jump_relu
from ...modeling.configuration_sparse_autoencoder import TOPK_ACTIVATIONS
from .certified import CertifiedTopK, fits
from .latent_selection import Among, Chooser, above, batch_top_k, choose, selected_by, top_k_of
from .sparse_ops import Selection, selected_pre_acts


@dataclass
class Code:
    """The latents of a batch, at the chosen places only.

    selection: which. pre_acts, latents: (nnz,). gate: (nnz,), of gated SAEs. sparsity: gives the term (n_tokens,).
    """

    selection: Selection
    pre_acts: Tensor
    latents: Tensor
    gate: Tensor | None = None
    sparsity: Callable[[SparseAutoencoder, Tensor], Tensor] | None = None


def encode(
    sae: SparseAutoencoder,
    x: Tensor,
    k: int,
    training: bool,
    bandwidth: float,
    among: Among | None = None,
    certified: CertifiedTopK | None = None,
) -> Code:
    """Latents of normalised hidden states (n_tokens, d_in).

    Args:
        k: of this step, for top-k activations.
        training: BatchTopK picks from the batch in training, and by its threshold otherwise.
        bandwidth: of a JumpReLU threshold's gradient.
        among: sees the same pre-activations; `encode_seen` then gives its latents.
        certified: of an SAE with the activation `topk`, in float32 on a CPU: chooses, where no `among` needs all
            pre-activations.
    """
    kind = sae.config.activation
    if kind in TOPK_ACTIVATIONS:
        if certified is not None and among is None and fits(k, sae.config.d_sae) and not _autocast(x):
            selection, values = certified.choose(_input(sae, x).detach(), sae.W_enc.detach(), sae.b_enc.detach(), k)
            pre_acts = _differentiable(sae, x, selection, values)
        else:
            selection, pre_acts = _chosen(sae, x, selected_by(kind, k), among)
        return Code(selection, pre_acts, after_top_k(pre_acts, kind))
    if kind == "batch_topk":
        if training:
            selection, values = batch_top_k(_input(sae, x).detach(), sae.W_enc, sae.b_enc, k, among)
            pre_acts = _differentiable(sae, x, selection, values)
        else:
            selection, pre_acts = _chosen(sae, x, above(sae.threshold.clamp(min=0)), among)
        return Code(selection, pre_acts, pre_acts)
    if kind == "jumprelu":
        # What lies just below a threshold does not pass, but moves it.
        selection, pre_acts = _chosen(sae, x, above(sae.threshold.detach() - bandwidth / 2), among)
        threshold = sae.threshold[selection.latents]
        code = Code(selection, pre_acts, jump_relu(pre_acts, threshold, bandwidth))
        code.sparsity = lambda sae, hidden: _sum_by_token(_Active.apply(pre_acts, threshold, bandwidth), selection)
        return code
    if kind == "gated":
        return _gated(sae, x, among)
    if kind == "relu":
        selection, pre_acts = _chosen(sae, x, above(0.0), among)
        code = Code(selection, pre_acts, torch.relu(pre_acts))
        code.sparsity = lambda sae, hidden: _l1(code, sae, hidden)
        return code
    selection, pre_acts = _chosen(sae, x, above(-torch.inf), among)
    return Code(selection, pre_acts, pre_acts)


def encode_among(sae: SparseAutoencoder, x: Tensor, k: int, among: Tensor, *, rectified: bool = True) -> Code:
    """The `k` largest latents of each token among some, (m,) int64; all of them where there are fewer. Largest is what
    the activation takes for it: `abs_topk` goes by magnitude."""
    columns = sae.W_enc.detach().index_select(1, among)
    found, values = choose(_input(sae, x).detach(), columns, bias_of(sae).detach()[among], _largest(sae, k))
    selection = Selection(found.latents, found.offsets, sae.config.d_sae, among)
    pre_acts = _differentiable(sae, x, selection, values)
    return Code(selection, pre_acts, after_top_k(pre_acts, sae.config.activation) if rectified else pre_acts)


def top_k_among(sae: SparseAutoencoder, k: int, latents: Tensor) -> Among:
    """The choice of `encode_among`, for `encode` to make with its own pre-activations."""
    return Among(latents, _largest(sae, k))


def encode_seen(sae: SparseAutoencoder, x: Tensor, among: Among) -> Code:
    """What `encode_among` returns, of the pre-activations that `encode` computed for the same `x`."""
    selection, values = among.found(sae.config.d_sae, sae.W_enc.dtype)
    pre_acts = _differentiable(sae, x, selection, values)
    return Code(selection, pre_acts, after_top_k(pre_acts, sae.config.activation))


def _largest(sae: SparseAutoencoder, k: int) -> Chooser:
    return top_k_of(k, magnitude=sae.config.activation == "abs_topk")


def bias_of(sae: SparseAutoencoder) -> Tensor:
    """The bias of the pre-activations that choose: a gated SAE's gate has its own."""
    return sae.b_gate if sae.config.activation == "gated" else sae.b_enc


def _input(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return x - sae.b_dec if sae.config.apply_b_dec_to_input else x


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _chosen(sae: SparseAutoencoder, x: Tensor, chooser: Chooser, among: Among | None) -> tuple[Selection, Tensor]:
    selection, values = choose(_input(sae, x).detach(), sae.W_enc.detach(), bias_of(sae).detach(), chooser, among)
    return selection, _differentiable(sae, x, selection, values)


def _differentiable(sae: SparseAutoencoder, x: Tensor, selection: Selection, values: Tensor) -> Tensor:
    b_dec = sae.b_dec if sae.config.apply_b_dec_to_input else None
    return selected_pre_acts(values, selection, x, sae.W_enc, bias_of(sae), b_dec)


def _gated(sae: SparseAutoencoder, x: Tensor, among: Among | None) -> Code:
    # "Improving dictionary learning with gated sparse autoencoders" (https://huggingface.co/papers/2404.16014)
    selection, gate = _chosen(sae, x, above(0.0), among)
    at = selection.latents
    magnitudes = (gate - sae.b_gate[at]) * sae.r_mag[at].exp() + sae.b_mag[at]
    code = Code(selection, gate, torch.relu(magnitudes), gate=gate)
    code.sparsity = lambda sae, hidden: _sum_by_token(gate, selection)
    return code


def _sum_by_token(values: Tensor, selection: Selection) -> Tensor:
    return values.new_zeros(selection.n_tokens).index_add(0, selection.tokens, values)


def _l1(code: Code, sae: SparseAutoencoder, hidden: Tensor) -> Tensor:
    mass = _sum_by_token(code.latents * sae.W_dec.norm(dim=-1)[code.selection.latents], code.selection)
    return mass / hidden.norm(dim=-1).clamp(min=torch.finfo(hidden.dtype).tiny)


class _Active(torch.autograd.Function):
    """1 where a pre-activation exceeds its threshold, with the rectangle-kernel estimate of the threshold's gradient:
    "Jumping ahead" (https://huggingface.co/papers/2407.14435), equation 12."""

    @staticmethod
    def forward(ctx, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        pre_acts, threshold = ctx.saved_tensors
        inside = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return None, torch.where(inside, -grad / ctx.bandwidth, 0.0), None
