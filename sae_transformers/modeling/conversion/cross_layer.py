"""Cross-layer transcoders and crosscoders, an SAE for each layer that is read.

Gemma Scope 2: `params_layer_<i>.safetensors` in `clt/width_W_l0_X[_affine]` and `crosscoder/layer_A_B_width_W_l0_X`,

    z_i = relu(pre_i) * (pre_i > threshold) with pre_i = x_i @ w_enc + b_enc
    y_m = sum_i z_i @ w_dec[:, m] + b_dec_m (+ x_m @ affine_skip_connection)

w_dec is (d_sae, places, d_out), over all places, the earlier ones too: a latent cannot change what has run, and what
is stored for those (zeros, if the training kept to it) is left out. `config.json` names the places with the layers in
braces, `model.layers.{5,9,12,15}.output` or `{all}`.

circuit-tracer: `W_enc_<i>.safetensors` (W_enc_i (d_sae, d_in), b_enc_i, b_dec_i, perhaps threshold_i) and
`W_dec_<i>.safetensors` (W_dec_i (d_sae, places from i on, d_out)), and `config.yaml`.

Sources: the readme of https://huggingface.co/google/gemma-scope-2; circuit-tracer 0.5.0,
circuit_tracer/transcoder/cross_layer_transcoder.py; https://github.com/decoderesearch/SAELens 6.54.12,
sae_lens/loading/pretrained_sae_loaders.py, which sums the decoders over the places.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .format import (
    Converted,
    Format,
    matrix,
    need,
    only,
    place_as_text,
    place_of_hook,
    shaped,
    takes,
    text,
    whole_name,
)
from .gemma_scope_2 import NAMES, SKIP, base_of, read_config

GEMMA_FILE = r"params_layer_(\d+)\.safetensors"
TRACER_FILE = r"W_enc_(\d+)\.safetensors"
CLT = "cross_layer_transcoder"


def _layer_of(checkpoint: Checkpoint, pattern: str) -> int | None:
    file = checkpoint.files[0] if len(checkpoint.files) == 1 else ""
    match = re.fullmatch(pattern, file)
    return int(match[1]) if match else None


def _in_blocks(decoder: Tensor, bias: Tensor, first: int, warnings: list[str]) -> tuple[Tensor, Tensor]:
    """W_dec (d_sae, places * d_out) and b_dec (places * d_out,) from place `first` on; the bias is of that place."""
    d_sae, places, d_out = decoder.shape
    if earlier := [place for place in range(first) if bool(decoder[:, place].any())]:
        warnings.append(
            f"its decoder rows to place {', '.join(map(str, earlier))}, which the model has passed when it reads, are "
            f"left out."
        )
    kept = decoder[:, first:].reshape(d_sae, -1)
    return kept, torch.cat([bias, bias.new_zeros((places - first - 1) * d_out)])


def _skip(matrix: Tensor, places: int) -> Tensor:
    """W_skip (places * d_out, d_in) of one (d_out, d_in) that writes to the first place."""
    return torch.cat([matrix, matrix.new_zeros((places - 1) * matrix.shape[0], matrix.shape[1])])


def _values(d_in: int, d_sae: int, d_out: int) -> dict[str, Any]:
    return {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "apply_b_dec_to_input": False}


# -- Gemma Scope 2 ---------------------------------------------------------------------------------------------------


def _is_gemma(checkpoint: Checkpoint) -> bool:
    return _layer_of(checkpoint, GEMMA_FILE) is not None and set(NAMES) <= checkpoint.names(checkpoint.files[0])


def _read_gemma(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    file, first = checkpoint.files[0], _layer_of(checkpoint, GEMMA_FILE) or 0
    where = checkpoint.label
    tensors = checkpoint.tensors(file)
    only(tensors, (*NAMES, SKIP), where)
    need(tensors, tuple(NAMES), where)
    d_in, d_sae = matrix(tensors, "w_enc", where).shape
    if tensors["w_dec"].ndim != 3 or tensors["w_dec"].shape[1] <= first:
        raise ValueError(
            f"w_dec in {where} must be (d_sae, places, d_out) with more than {first} places, as its file's number "
            f"asks for. Received: shape {tuple(tensors['w_dec'].shape)}."
        )
    _, count, d_out = tensors["w_dec"].shape
    shaped(tensors, "w_dec", (d_sae, count, d_out), where)
    warnings: list[str] = []
    decoder, bias = _in_blocks(tensors["w_dec"], shaped(tensors, "b_dec", (d_out,), where), first, warnings)
    ours = {"W_enc": tensors["w_enc"], "W_dec": decoder, "b_dec": bias}
    ours |= {name: shaped(tensors, name, (d_sae,), where) for name in ("b_enc", "threshold")}
    values = _values(d_in, d_sae, decoder.shape[1]) | {"activation": "jumprelu", "skip_connection": SKIP in tensors}
    if SKIP in tensors:
        ours["W_skip"] = _skip(shaped(tensors, SKIP, (d_in, d_out), where).T, count - first)
    converted = Converted(values, ours, warnings)
    beside = checkpoint.within(checkpoint.folder)
    config, where = read_config(beside, converted, width=count * d_sae, skip=SKIP in tensors)
    values.update(_gemma_places(checkpoint, config, where, first, count))
    values["metadata"] = {"context_length": 1024, "prepend_bos": True}
    if base := base_of(checkpoint, text(config, "model_name", where)):
        values["metadata"]["base_model"] = base
    return converted


def _gemma_places(
    checkpoint: Checkpoint, config: dict[str, Any], where: str, first: int, count: int
) -> dict[str, Any]:
    hook, hook_out = text(config, "hf_hook_point_in", where), text(config, "hf_hook_point_out", where)
    if not hook or not hook_out:
        match = re.search(r"(?:^|/)crosscoder/layer_([\d_]+)_width_", whole_name(checkpoint))
        if match:
            hook = hook_out = f"layers.{{{match[1].replace('_', ',')}}}.resid_post"
        elif re.search(r"(?:^|/)clt/width_", whole_name(checkpoint)):
            hook, hook_out = "layers.{all}.mlp_in", "layers.{all}.mlp_out"
        else:
            return {}
        layer = _filled(hook, count, checkpoint.label)[first].split(".")
        return {
            "layer": int(layer[1]),
            "site": layer[2],
            "hooks_out": _filled(hook_out, count, checkpoint.label)[first:],
        }
    return {"hook": _filled(hook, count, where)[first], "hooks_out": _filled(hook_out, count, where)[first:]}


def _filled(hook: str, count: int, where: str) -> list[str]:
    """The places of a pattern: `model.layers.{5,9}.output` is two."""
    match = re.fullmatch(r"([^{}]*)\{([\d,\s]+|all)\}([^{}]*)", hook)
    layers = (
        list(range(count)) if match and match[2] == "all" else [int(n) for n in match[2].split(",")] if match else []
    )
    if match is None or len(layers) != count:
        raise ValueError(
            f"The places in {where} must be those of the {count} that its decoder writes to, with their layers in "
            f"braces. Received: {hook!r}."
        )
    return [f"{match[1]}{layer}{match[3]}" for layer in layers]


GEMMA_SCOPE_2 = Format("Gemma Scope 2, several layers", GEMMA_FILE, _is_gemma, _read_gemma, one_file=True)


# -- circuit-tracer --------------------------------------------------------------------------------------------------


def _is_tracer(checkpoint: Checkpoint) -> bool:
    layer = _layer_of(checkpoint, TRACER_FILE)
    return layer is not None and f"W_enc_{layer}" in checkpoint.names(checkpoint.files[0])


def _read_tracer(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    layer, where = _layer_of(checkpoint, TRACER_FILE) or 0, checkpoint.label
    encoder = checkpoint.tensors(checkpoint.files[0])
    names = {name: f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    only(encoder, tuple(names.values()), where)
    d_sae, d_in = matrix(encoder, names["W_enc"], where).shape
    beside = checkpoint.within(checkpoint.folder)
    other = f"W_dec_{layer}.safetensors"
    if not beside.has(other):
        raise ValueError(f"{where} is the encoder of layer {layer}; expected its decoder beside it, {other}.")
    decoder, name = beside.tensors(other), f"W_dec_{layer}"
    only(decoder, (name,), f"{beside.label}/{other}")
    need(decoder, (name,), f"{beside.label}/{other}")
    if decoder[name].ndim != 3:
        raise ValueError(
            f"{name} in {beside.label}/{other} must be (d_sae, places, d_out). Received: shape "
            f"{tuple(decoder[name].shape)}."
        )
    _, count, d_out = decoder[name].shape
    shaped(decoder, name, (d_sae, count, d_out), f"{beside.label}/{other}")
    warnings: list[str] = []
    W_dec, b_dec = _in_blocks(decoder[name], shaped(encoder, names["b_dec"], (d_out,), where), 0, warnings)
    ours = {"W_enc": encoder[names["W_enc"]].T, "W_dec": W_dec, "b_dec": b_dec}
    ours["b_enc"] = shaped(encoder, names["b_enc"], (d_sae,), where)
    has_threshold = names["threshold"] in encoder
    if has_threshold:
        ours["threshold"] = shaped(encoder, names["threshold"], (d_sae,), where)
    values = _values(d_in, d_sae, W_dec.shape[1]) | {"activation": "jumprelu" if has_threshold else "relu"}
    values.update(_tracer_places(beside, layer, count, warnings))
    return Converted(values, ours, warnings)


def _tracer_places(beside: Checkpoint, layer: int, count: int, warnings: list[str]) -> dict[str, Any]:
    config, where = (beside.yaml("config.yaml") if beside.has("config.yaml") else {}), f"{beside.label}/config.yaml"
    if (kind := text(config, "model_kind", where) or CLT) != CLT:
        raise ValueError(f"`model_kind` in {where} must be {CLT!r}, as its files. Received: {kind!r}.")
    base = text(config, "model_name", where)
    metadata = {"metadata": {"base_model": base} if base else {}}
    # What circuit-tracer takes where the config does not say.
    reads = text(config, "feature_input_hook", where) or "hook_resid_mid"
    writes = text(config, "feature_output_hook", where) or "hook_mlp_out"
    written = [place_as_text(f"blocks.{place}.{writes}") for place in range(layer, layer + count)]
    place = place_of_hook(f"blocks.{layer}.{reads}")
    if reads == "hook_resid_mid" and (norm := _norm_before_the_mlp(base or "")):
        place = {"hook": f"model.layers.{layer}.{norm}.input"}
    if not place or None in written:
        warnings.append(
            f"it reads {reads} and writes {writes} of TransformerLens; it has no place until `layer` and `site`, or "
            f"`hook`, and `hooks_out` give it one."
        )
        return metadata
    return {**place, "hooks_out": written, **metadata}


def _norm_before_the_mlp(base: str) -> str | None:
    """The module that reads the stream between attention and MLP, of families that transcoders are published for."""
    name = base.lower()
    if re.search(r"gemma-[23]-", name):
        return "pre_feedforward_layernorm"
    return "post_attention_layernorm" if re.search(r"llama|qwen|gemma-2b|gemma-7b|mistral", name) else None


CIRCUIT_TRACER = Format("circuit-tracer, cross-layer", TRACER_FILE, _is_tracer, _read_tracer, one_file=True)
FORMATS = (GEMMA_SCOPE_2, CIRCUIT_TRACER)
