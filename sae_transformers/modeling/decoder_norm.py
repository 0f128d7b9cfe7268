"""The norms of decoder rows, moved from the decoder into the latents.

    W_dec[i] = n_i * u_i, |u_i| = 1        z_i * W_dec[i] = (n_i * z_i) * u_i

The latents of an SAE folded so are `n_i * z_i`: how far each moves the hidden state. They are what SAELens gives after
`fold_W_dec_norm`, and so what Neuronpedia shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .configuration_sparse_autoencoder import TOPK_ACTIVATIONS, SparseAutoencoderConfig

FOLDED = "decoder_norm_folded"  # in `config.metadata`
# f(n * x) is not n * f(x): no weights give the latents times the norms.
NOT_HOMOGENEOUS = {"topk-sigmoid": "a sigmoid", "topk-tanh": "a hyperbolic tangent"}
# With the latents: what is added to a pre-activation, and what it is compared with.
OF_LATENTS = ("b_enc", "b_gate", "b_mag", "threshold", "feature_max")


def check_foldable(config: SparseAutoencoderConfig, name: str) -> None:
    """Raises ValueError where the activation cannot be scaled."""
    if config.activation in NOT_HOMOGENEOUS:
        raise ValueError(
            f"The norms of {name}'s decoder rows cannot be folded: its latents are "
            f"{NOT_HOMOGENEOUS[config.activation]} of the pre-activation, which does not scale with it. "
            f"Expected fold_decoder_norm=False. Received: activation={config.activation!r}."
        )


@torch.no_grad()
def folded_decoder_norm(
    config: SparseAutoencoderConfig, tensors: dict[str, Tensor]
) -> tuple[SparseAutoencoderConfig, dict[str, Tensor]]:
    """Config and tensors of an SAE with the same reconstruction, decoder rows of norm 1, and latents times the norms.

    Top-k activations go on choosing by the values before (`scaled_selection`, by 1 / n_i); the one threshold of
    `batch_topk` becomes one for each latent, so the SAE is a `jumprelu` one; `tied` matrices become two. A gated SAE's
    gate and magnitude are both scaled, a GLU's gate is not. A row of zeros stays as it is.

    Args:
        config: of an SAE that `check_foldable` lets pass.
        tensors: its state dict, left unchanged.
    """
    W_dec = tensors["W_dec"]
    norms = torch.linalg.vector_norm(W_dec, dim=-1, dtype=_wide(W_dec))  # (d_sae,)
    norms = norms.where(norms > 0, torch.ones_like(norms))
    changed: dict[str, object] = {"metadata": {**config.metadata, FOLDED: True}}
    found = dict(tensors)
    if config.tied:
        found["W_enc"], changed["tied"] = W_dec.T, False
    if config.activation == "batch_topk":
        found["threshold"] = found["threshold"].expand(config.d_sae)
        changed |= {"activation": "jumprelu", "k": None}
    if config.activation in TOPK_ACTIVATIONS:
        chosen_by = found.get("selection_scale", torch.ones_like(norms))
        found["selection_scale"] = (chosen_by.to(norms.dtype) / norms).to(W_dec.dtype)
        changed["scaled_selection"] = True
    found["W_dec"] = (W_dec.to(norms.dtype) / norms[:, None]).to(W_dec.dtype)
    for key in ("W_enc", *OF_LATENTS):  # the last dimension of each is the latents'
        if key in found:
            found[key] = (found[key].to(norms.dtype) * norms).to(found[key].dtype)
    return replace(config, **changed), found  # pyright: ignore[reportArgumentType]


def maxima_convention(config: SparseAutoencoderConfig, feature_max: Tensor) -> str:
    """Which latents `feature_max` is of, in words; empty where no maximum is known."""
    if not bool((feature_max > 0).any()):
        return ""
    return (
        "of latents times decoder norms, as on Neuronpedia" if config.metadata.get(FOLDED) else "of latents as stored"
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
