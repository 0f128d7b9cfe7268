"""Llama Scope: `Llama3_1-8B-Base-L{n}{R|A|M|TC}-{8|32}x`, and the SAEs of DeepSeek-R1-Distill-Llama-8B.

The first release, `hyperparams.json` and `checkpoints/final.safetensors`, with s = sqrt(d) / average norm:

    pre    = |W_D| * (hidden * s_in @ encoder.weight.T + encoder.bias) / s_out
    z      = pre where pre > jump_relu_threshold, else 0
    output = z @ (W_D / |W_D|) + decoder.bias / s_out

"Llama Scope: extracting millions of features from Llama-3.1-8B with sparse autoencoders"
(https://huggingface.co/papers/2410.20526), https://github.com/OpenMOSS/Language-Model-SAEs, tag v1.0.0, whose loader
folds the scales and the decoder's norms into the weights. So does this one: the threshold is in units of the folded
latents. Without `sparsity_include_decoder_norm`,

    pre    = (hidden * s_in @ encoder.weight.T + encoder.bias) / s_in
    output = z @ W_D * s_in / s_out + decoder.bias / s_out

The second release, `config.json` and `sae_weights.safetensors`, has the mathematics of llamascopium.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint import Checkpoint
from .format import (
    Converted,
    Format,
    agree,
    flag,
    full,
    matrix,
    no_other_words,
    number,
    only,
    place_of_hooks,
    shaped,
    takes,
    text,
    whole_name,
)
from .llamascopium import FILE as STANDARD_FILE
from .llamascopium import LOG_THRESHOLD, is_ours, standard

HYPERPARAMETERS, FILE = "hyperparams.json", "checkpoints/final.safetensors"
ACTIVATIONS = ("jumprelu", "topk", "relu")
DISTILLED = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
# As SAELens' loaders of both releases have it; no file says so.
TRAINED_ON = {"context_length": 1024, "prepend_bos": True}
DISTILLED_NAMES = {
    "encoder.bias": "b_E",
    "decoder.bias": "b_D",
    "log_jumprelu_threshold": LOG_THRESHOLD,
    "encoder.weight": "W_E",
    "decoder.weight": "W_D",
}


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    where, inside = f"{HYPERPARAMETERS} of {checkpoint.label}", f"{FILE} of {checkpoint.label}"
    config, tensors = checkpoint.json(HYPERPARAMETERS), checkpoint.tensors(FILE)
    no_other_words(config, ("act_fn",), where)
    activation = text(config, "act_fn", where)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`act_fn` in {where} must be one of {', '.join(ACTIVATIONS)}. Received: act_fn={activation!r}."
        )
    if flag(config, "use_glu_encoder", where, False):
        raise ValueError(f"`use_glu_encoder` in {where} must be false: no release has it. Received: True.")
    bias = flag(config, "use_decoder_bias", where, True)
    only(tensors, ("encoder.weight", "encoder.bias", "decoder.weight", *(("decoder.bias",) if bias else ())), inside)
    d_sae, d_in = matrix(tensors, "encoder.weight", inside).shape
    d_out = matrix(tensors, "decoder.weight", inside).shape[0]
    agree(config, {"d_model": d_in, "d_sae": d_sae}, where)
    s_in, s_out = _scales(config, d_in, d_out, where)
    # What is computed stays in float32: half precision would move latents across the threshold.
    decoder = shaped(tensors, "decoder.weight", (d_out, d_sae), inside).to(torch.float32, copy=True)
    encoder = tensors["encoder.weight"].to(torch.float32, copy=True)
    b_enc = shaped(tensors, "encoder.bias", (d_sae,), inside).double()
    b_dec = shaped(tensors, "decoder.bias", (d_out,), inside).double() if bias else torch.zeros(d_out).double()
    if flag(config, "sparsity_include_decoder_norm", where, True):
        norms = torch.linalg.vector_norm(tensors["decoder.weight"], dim=0, dtype=torch.float64)
        encoder *= (norms * s_in / s_out).float()[:, None]
        decoder /= norms.where(norms > 0, torch.ones_like(norms)).float()
        b_enc = b_enc * norms / s_out
    else:
        decoder *= s_in / s_out
        b_enc = b_enc / s_in
    ours = {
        "W_enc": encoder.T,
        "W_dec": decoder.T,
        "b_enc": b_enc.float(),
        "b_dec": (b_dec / s_out).float(),
    }
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "activation": activation}
    values["apply_b_dec_to_input"] = flag(config, "apply_decoder_bias_to_pre_encoder", where, False)
    if activation == "jumprelu":
        threshold = number(config, "jump_relu_threshold", where)
        if threshold < 0:
            raise ValueError(
                f"`jump_relu_threshold` in {where} must not be negative. Received: jump_relu_threshold={threshold!r}."
            )
        ours["threshold"] = full(threshold, ours["b_enc"], d_sae)
    elif activation == "topk":
        values["k"] = number(config, "top_k", where, kind=int)
    hook_in = text(config, "hook_point_in", where)
    place, warnings = place_of_hooks(hook_in, text(config, "hook_point_out", where))
    values |= place
    values["metadata"] = {**TRAINED_ON, **({"original_hook": hook_in} if hook_in else {})}
    if base := _base(checkpoint):
        values["metadata"]["base_model"] = base
    return Converted(values, ours, warnings)


def _scales(config: Mapping[str, Any], d_in: int, d_out: int, where: str) -> tuple[float, float]:
    kind = text(config, "norm_activation", where)
    if kind in (None, "none", "inference"):
        return 1.0, 1.0
    norms = config.get("dataset_average_activation_norm")
    if kind != "dataset-wise" or not isinstance(norms, Mapping):
        raise ValueError(
            f"`norm_activation` in {where} must be 'dataset-wise', with `dataset_average_activation_norm` of 'in' and "
            f"'out', or 'none'. Received: norm_activation={kind!r}, dataset_average_activation_norm={norms!r}."
        )
    values = [number(norms, name, f"`dataset_average_activation_norm` of {where}") for name in ("in", "out")]
    if min(values) <= 0:
        raise ValueError(
            f"`dataset_average_activation_norm` in {where} must be positive. Received: "
            f"dataset_average_activation_norm={norms!r}."
        )
    return math.sqrt(d_in) / values[0], math.sqrt(d_out) / values[1]


def _base(checkpoint: Checkpoint) -> str | None:
    if checkpoint.has("lm_config.json"):
        where = f"lm_config.json of {checkpoint.label}"
        if name := text(checkpoint.json("lm_config.json"), "model_name", where):
            return name
    return "meta-llama/Llama-3.1-8B" if re.search("Llama3_1-8B-Base", whole_name(checkpoint)) else None


def read_distilled(checkpoint: Checkpoint) -> Converted:
    found = checkpoint.tensors(STANDARD_FILE)
    tensors = {
        DISTILLED_NAMES.get(name, name): tensor.T if tensor.ndim == 2 else tensor for name, tensor in found.items()
    }
    converted = standard(checkpoint, tensors)
    converted.values["metadata"] |= {**TRAINED_ON, "base_model": DISTILLED}
    return converted


FORMAT = Format(
    "Llama Scope",
    r"checkpoints/final\.safetensors",
    lambda checkpoint: checkpoint.has(HYPERPARAMETERS, FILE),
    read,
)
DISTILLED_FORMAT = Format(
    "Llama Scope R1-Distill",
    r"sae_weights\.safetensors",
    lambda checkpoint: is_ours(checkpoint, "encoder.weight"),
    read_distilled,
)
