"""SAEs and transcoders of Llamascopium: `config.json`, `sae_weights.safetensors`.

    x      = hidden * sqrt(d_in) / norm_in
    pre    = x @ W_E + b_E                           (GLU: * sigmoid(x @ W_E_glu + b_E_glu))
    z      = act(pre * |W_D|) / |W_D|                (|W_D| where `sparsity_include_decoder_norm`; jumprelu, top-k)
    output = (z @ W_D + b_D) * norm_out / sqrt(d_out)

https://github.com/OpenMOSS/Language-Model-SAEs. The scales stay outside the weights: the library's own fold leaves the
threshold and the gate of the GLU behind, and gives other latents. What it saved folded (`norm_activation:
"inference"`) is read as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .format import (
    Converted,
    Format,
    agree,
    flag,
    matrix,
    no_other_words,
    number,
    only,
    place_of_hooks,
    shaped,
    takes,
    text,
)

CONFIG, FILE = "config.json", "sae_weights.safetensors"
NORM = "dataset_average_activation_norm."
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
ACTIVATIONS = ("relu", "jumprelu", "topk")


def is_ours(checkpoint: Checkpoint, encoder: str) -> bool:
    """Whether the files are of this family, with an encoder of that name."""
    if not checkpoint.has(CONFIG, FILE) or not {"act_fn", "norm_activation"} <= set(checkpoint.json(CONFIG)):
        return False
    return encoder in checkpoint.names(FILE)


def read(checkpoint: Checkpoint) -> Converted:
    return standard(checkpoint, checkpoint.tensors(FILE))


def standard(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Converted:
    """An SAE whose tensors have this format's names."""
    takes(checkpoint)
    config, where, inside = checkpoint.json(CONFIG), f"{CONFIG} of {checkpoint.label}", f"{FILE} of {checkpoint.label}"
    no_other_words(config, ("act_fn", "sae_type"), where)
    activation = text(config, "act_fn", where)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`act_fn` in {where} must be one of {', '.join(ACTIVATIONS)}. Received: act_fn={activation!r}."
        )
    if text(config, "sae_type", where) not in (None, "sae"):
        raise ValueError(f"`sae_type` in {where} must be 'sae'. Received: sae_type={config['sae_type']!r}.")
    glu, bias = flag(config, "use_glu_encoder", where, False), flag(config, "use_decoder_bias", where, True)
    names = ("W_E", "b_E", "W_D", *(("b_D",) if bias else ()), *(("W_E_glu", "b_E_glu") if glu else ()))
    names += (LOG_THRESHOLD,) if activation == "jumprelu" else ()
    only({name: None for name in tensors if not name.startswith(NORM)}, names, inside)
    d_in, d_sae = matrix(tensors, "W_E", inside).shape
    d_out = matrix(tensors, "W_D", inside).shape[1]
    agree(config, {"d_model": d_in, "d_sae": d_sae}, where)
    if abs(number(config, "expansion_factor", where, default=d_sae / d_in) * d_in - d_sae) > 0.5:
        raise ValueError(
            f"`expansion_factor` in {where} must be {d_sae / d_in}, as its tensors. Received: "
            f"expansion_factor={config['expansion_factor']!r}."
        )
    ours = {
        "W_enc": tensors["W_E"],
        "W_dec": shaped(tensors, "W_D", (d_sae, d_out), inside),
        "b_enc": shaped(tensors, "b_E", (d_sae,), inside),
        "b_dec": shaped(tensors, "b_D", (d_out,), inside) if bias else tensors["W_D"].new_zeros(d_out),
    }
    if glu:
        ours["W_glu"] = shaped(tensors, "W_E_glu", (d_in, d_sae), inside)
        ours["b_glu"] = shaped(tensors, "b_E_glu", (d_sae,), inside)
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "activation": activation, "glu": glu}
    values["apply_b_dec_to_input"] = flag(config, "apply_decoder_bias_to_pre_encoder", where, False)
    norms = None
    if flag(config, "sparsity_include_decoder_norm", where, True):
        norms = torch.linalg.vector_norm(tensors["W_D"], dim=1, dtype=torch.float64)
    if activation == "jumprelu":
        threshold = shaped(tensors, LOG_THRESHOLD, (d_sae,), inside).double().exp()
        # A latent without a decoder row never fires; its threshold must stay a number.
        ours["threshold"] = threshold if norms is None else (threshold / norms).clamp(max=1e30)
    elif activation == "topk":
        values["k"] = number(config, "top_k", where, kind=int)
        if norms is not None:
            values["scaled_selection"], ours["selection_scale"] = True, norms
    hook_in, hook_out = text(config, "hook_point_in", where), text(config, "hook_point_out", where)
    values.update(_scales(config, tensors, {hook_in: d_in, hook_out or hook_in: d_out}, where, inside))
    place, warnings = place_of_hooks(hook_in, hook_out)
    values |= place
    values["metadata"] = {"original_hook": hook_in} if hook_in else {}
    return Converted(values, ours, warnings)


def _scales(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hooks: Mapping[str | None, int], where: str, inside: str
) -> dict[str, Any]:
    """`input_scale` and `output_scale`, sqrt(d) over the average norm at each hook."""
    kind = text(config, "norm_activation", where)
    if kind in (None, "none", "inference"):
        return {}
    if kind != "dataset-wise":
        raise ValueError(
            f"`norm_activation` in {where} must be 'dataset-wise', 'inference' or 'none'. Received: "
            f"norm_activation={kind!r}."
        )
    scales = []
    for hook, size in hooks.items():
        norm = tensors.get(f"{NORM}{hook}")
        value = float(norm) if norm is not None and norm.numel() == 1 else None
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"{inside} must hold a positive number {NORM}{hook}. Received: {norm}.")
        scales.append(math.sqrt(size) / value)
    return {"normalization": "scalar", "input_scale": scales[0], "output_scale": scales[-1]}


FORMAT = Format("Llamascopium", r"sae_weights\.safetensors", lambda checkpoint: is_ours(checkpoint, "W_E"), read)
