"""Vectors of the hidden state as SAEs, so that `Steering` can add them or put them in a state's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modeling import SparseAutoencoder, SparseAutoencoderConfig


def direction_sae(directions: Tensor, like: SparseAutoencoderConfig) -> SparseAutoencoder:
    """Directions as the decoder rows of an SAE at the place of another, to be steered along with op `direction`.

    Put it into the model beside the other: `SaeForCausalLM.from_base(base, saes=[sae, direction_sae(...)])`. A
    difference of two mean states is activation addition (https://huggingface.co/papers/2308.10248).

    Args:
        directions: (m, d_out), such as `fit_diffmean` gives; they are brought to norm 1.
        like: of the SAE where it writes.

    Raises:
        ValueError: a direction is zero or not finite, or widths differ.
    """
    norms = directions.float().norm(dim=-1, keepdim=True)
    if (
        directions.ndim != 2
        or directions.shape[1] != like.d_out
        or not bool((norms > 0).all() & norms.isfinite().all())
    ):
        raise ValueError(
            f"Expected directions (m, {like.d_out}), finite and not zero. Received: {tuple(directions.shape)}."
        )
    return _written(like, directions / norms, (directions / norms).T, None)


def constant_sae(state: Tensor, like: SparseAutoencoderConfig) -> SparseAutoencoder:
    """An SAE that reconstructs everything as one state: `Steering(reconstruct=(n,))` puts it there, as task vectors
    do (https://huggingface.co/papers/2310.15213).

    Args:
        state: (d_out,).
        like: of the SAE where it writes.

    Raises:
        ValueError: the state has another width.
    """
    if state.shape != (like.d_out,):
        raise ValueError(f"Expected a state ({like.d_out},). Received: {tuple(state.shape)}.")
    nothing = torch.zeros_like(state)[None]
    return _written(like, nothing, nothing.T, state)


def _written(like: SparseAutoencoderConfig, W_dec: Tensor, W_enc: Tensor, b_dec: Tensor | None) -> SparseAutoencoder:
    if like.hooks_out:
        raise ValueError(
            f"A vector is written to one place. Expected the config of an SAE of one. Received: {like.write_at}."
        )
    hook = like.hook_out or like.hook
    place: dict[str, Any] = {"hook": hook} if hook else {"layer": like.layer, "site": like.site}
    config = SparseAutoencoderConfig(
        d_in=W_dec.shape[1], d_sae=len(W_dec), activation="relu", apply_b_dec_to_input=False, **place
    )
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_enc)
        sae.b_enc.zero_()
        sae.b_dec.zero_() if b_dec is None else sae.b_dec.copy_(b_dec)
    return sae
