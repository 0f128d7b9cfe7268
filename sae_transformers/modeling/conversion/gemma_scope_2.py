"""Gemma Scope 2: JumpReLU SAEs and skip transcoders of Gemma 3, `<site>/layer_N_width_W_l0_X/params.safetensors`.

    pre = x @ w_enc + b_enc ; z = relu(pre) * (pre > threshold)
    output = z @ w_dec + b_dec (+ x @ affine_skip_connection)

https://huggingface.co/google/gemma-scope-2. `config.json` names modules of Hugging Face; some folders lack it or hold
one that cannot be read, and the path says the place.
"""

from __future__ import annotations

import re
from typing import Any

from .checkpoint import Checkpoint
from .format import Converted, Format, agree, flag, matrix, no_other_words, only, shaped, takes, text, whole_name

FILE = "params.safetensors"
SKIP = "affine_skip_connection"
NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
SITES = {"resid_post": "resid_post", "attn_out": "attn_heads", "mlp_out": "mlp_out", "transcoder": "mlp_in"}


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    where = f"{FILE} of {checkpoint.label}"
    tensors = checkpoint.tensors(FILE)
    only(tensors, (*NAMES, SKIP), where)
    if "w_dec" in tensors and tensors["w_dec"].ndim == 3:
        raise ValueError(
            f"{where} is a layer of a cross-layer transcoder; expected a file named params_layer_<number>.safetensors."
        )
    d_in, d_sae = matrix(tensors, "w_enc", where).shape
    d_out = matrix(tensors, "w_dec", where).shape[1]
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    shapes["threshold"] = (d_sae,)
    ours = {NAMES[name]: shaped(tensors, name, shape, where) for name, shape in shapes.items()}
    if SKIP in tensors:
        ours["W_skip"] = shaped(tensors, SKIP, (d_in, d_out), where).T
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "activation": "jumprelu"}
    values.update(apply_b_dec_to_input=False, skip_connection=SKIP in tensors)
    # As SAELens' loader of these files has it; no file says so.
    values["metadata"] = {"context_length": 1024, "prepend_bos": True}
    converted = Converted(values, ours)
    config, where = read_config(checkpoint, converted, width=d_sae, skip=SKIP in tensors)
    values.update(_place(checkpoint, config, where))
    if base := base_of(checkpoint, text(config, "model_name", where)):
        values["metadata"]["base_model"] = base
    return converted


def read_config(checkpoint: Checkpoint, converted: Converted, *, width: int, skip: bool) -> tuple[dict[str, Any], str]:
    """The config beside an SAE, held against its tensors, and its name; empty where there is none or none that can be
    read.

    Args:
        width: latents, of all layers together. skip: whether there is a skip connection.
    """
    config, where = {}, f"config.json of {checkpoint.label}"
    if checkpoint.has("config.json"):
        try:
            config = checkpoint.json("config.json")
        except ValueError as error:
            converted.warnings.append(f"its place is taken from its path, its config cannot be read ({error})")
    agree(config, {"width": width}, where)
    no_other_words(config, ("architecture",), where)
    if text(config, "architecture", where) not in (None, "jump_relu"):
        raise ValueError(
            f"`architecture` in {where} must be 'jump_relu'. Received: architecture={config['architecture']!r}."
        )
    if flag(config, "affine_connection", where, skip) is not skip:
        raise ValueError(
            f"`affine_connection` in {where} must be {skip}, as its tensors. Received: "
            f"affine_connection={config['affine_connection']!r}."
        )
    return config, where


def _place(checkpoint: Checkpoint, config: dict[str, Any], where: str) -> dict[str, Any]:
    hook, hook_out = text(config, "hf_hook_point_in", where), text(config, "hf_hook_point_out", where)
    if hook:
        return {"hook": hook, "hook_out": hook_out if hook_out != hook else None}
    match = re.search(rf"(?:^|/)({'|'.join(SITES)})(?:_all)?/layer_(\d+)_width_", whole_name(checkpoint))
    if not match:
        return {}
    written = f"layers.{int(match[2])}.mlp_out" if match[1] == "transcoder" else None
    return {"layer": int(match[2]), "site": SITES[match[1]], "hook_out": written}


def base_of(checkpoint: Checkpoint, stated: str | None) -> str | None:
    """Hub id of the model, by the config or by the repository's name."""
    match = re.search(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)", whole_name(checkpoint))
    base = stated or (f"google/gemma-3-{match[1]}-{match[2]}" if match else None)
    if base and "/" not in base:
        base = f"google/{base}"
    # The smallest one has no suffix on the Hub.
    return base.replace("gemma-3-270m-pt", "gemma-3-270m") if base else None


FORMAT = Format("Gemma Scope 2", r"params\.safetensors", lambda checkpoint: checkpoint.has(FILE), read)
