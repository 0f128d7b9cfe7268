"""SAEs of OpenAI for GPT-2 small: `<site><version>/autoencoders/<layer>.pt`.

    x      = layer_norm(hidden) for TopK, hidden for others
    z      = act((x - pre_bias) @ encoder.weight.T + latent_bias)
    output = z @ decoder.weight.T + pre_bias, denormalised

"Scaling and evaluating sparse autoencoders" (https://huggingface.co/papers/2406.04093),
https://github.com/openai/sparse_autoencoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .format import Converted, Format, matrix, number, one_pickle, only, shaped, takes, text, whole_name

WEIGHTS = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
# The latter two are what newer torch adds to the state dict of its own accord.
OTHER = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")
ACTIVATIONS = {"ReLU": "relu", "Identity": "identity", "TopK": "topk"}
AFTER_TOP_K = {"ReLU": "topk", "Identity": "topk-identity"}
SITES = {
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
    "mlp_post_act": "mlp_act",
}


def recognise(checkpoint: Checkpoint) -> bool:
    file = one_pickle(checkpoint)
    return file is not None and {"pre_bias", "latent_bias", "encoder.weight"} <= checkpoint.names(file)


def read(checkpoint: Checkpoint) -> Converted:
    file, where = checkpoint.files[0], checkpoint.label
    found: dict[str, Any] = checkpoint.pickled(file)
    only(found, (*WEIGHTS, *STATISTICS, *OTHER), where)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    d_sae, d_in = matrix(tensors, "encoder.weight", where).shape
    ours = {
        "W_enc": tensors["encoder.weight"].T,
        "W_dec": shaped(tensors, "decoder.weight", (d_in, d_sae), where).T,
        "b_enc": shaped(tensors, "latent_bias", (d_sae,), where),
        "b_dec": shaped(tensors, "pre_bias", (d_in,), where),
    }
    # Section 2.1 of the paper: contexts of 64 tokens.
    metadata = {"base_model": "openai-community/gpt2", "context_length": 64}
    values = {"d_in": d_in, "d_sae": d_sae, "metadata": metadata, **_activation(checkpoint, found, where)}
    converted = Converted(values, ours)
    name = whole_name(checkpoint)
    layer = re.search(r"(\d+)\.pt$", file)
    sites = re.findall("resid_(?:delta|post)_(?:attn|mlp)|mlp_post_act", name)
    if sites and layer and sites[-1] in SITES:
        values.update(layer=int(layer[1]), site=SITES[sites[-1]])
    elif sites and layer:
        hook = f"h.{int(layer[1])}.ln_2.input"
        converted.warnings.append(
            f"it was trained on the stream between attention and MLP, where no module stands, and has no place; "
            f"hook={hook!r} reads there, but what it writes reaches the MLP alone."
        )
    return converted


def _activation(checkpoint: Checkpoint, found: dict[str, Any], where: str) -> dict[str, Any]:
    name = text(found, "activation", where) or "ReLU"
    if name not in ACTIVATIONS:
        raise ValueError(
            f"`activation` in {where} must be one of {', '.join(ACTIVATIONS)}. Received: activation={name!r}."
        )
    if name != "TopK":
        takes(checkpoint)
        return {"activation": ACTIVATIONS[name]}
    stated: Any = found.get("activation_state_dict") or {}
    if not isinstance(stated, Mapping):
        raise ValueError(f"`activation_state_dict` in {where} must be a dict. Received: {stated!r}.")
    stated = {key: found[f"activation.{key}"] for key in ("k", "postact_fn") if f"activation.{key}" in found} | dict(
        stated
    )
    takes(checkpoint, *(() if "k" in stated else ("k",)))
    after = text(stated, "postact_fn", where) or "ReLU"
    if after not in AFTER_TOP_K:
        raise ValueError(
            f"`postact_fn` in {where} must be one of {', '.join(AFTER_TOP_K)}. Received: postact_fn={after!r}."
        )
    k = number(stated | checkpoint.given, "k", where, kind=int)
    # The layer norm is not stored: the original loader switches it on for this activation and no other.
    return {"activation": AFTER_TOP_K[after], "k": k, "normalization": "layer_norm"}


FORMAT = Format("OpenAI", r"\d+\.pt", recognise, read, one_file=True)
