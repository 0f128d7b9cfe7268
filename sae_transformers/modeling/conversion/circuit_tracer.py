"""circuit-tracer: a transcoder a layer, `layer_<n>.safetensors`, and one `config.yaml` for all of them.

    z = act(x @ W_enc.T + b_enc) ; output = z @ W_dec + b_dec (+ x @ W_skip.T)

act is relu, or with `activation_function.threshold` jumprelu. The config names hooks of TransformerLens without their
block: `feature_input_hook: mlp.hook_in`, `feature_output_hook: hook_mlp_out`. Cross-layer transcoders
(`model_kind: cross_layer_transcoder`) are another architecture and are refused.

Source: https://github.com/safety-research/circuit-tracer (0.5.0), circuit_tracer/transcoder/single_layer_transcoder.py
and circuit_tracer/utils/hf_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..output_files import locked_folder, write_whole
from .checkpoint import Checkpoint
from .format import (
    SITE_NAMES,
    Converted,
    Format,
    matrix,
    only,
    place_of_hooks,
    refuse,
    save_tensors,
    shaped,
    takes,
    text,
    whole_name,
    without_input_scale,
)

FORM = "circuit-tracer"
CONFIG = "config.yaml"
FILE = r"layer_(\d+)\.safetensors"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
THRESHOLD = "activation_function.threshold"
KIND = "transcoder_set"


def recognise(checkpoint: Checkpoint) -> bool:
    file = checkpoint.files[0] if len(checkpoint.files) == 1 else ""
    if re.fullmatch(FILE, file) is None:
        return False
    return set(NAMES) <= checkpoint.names(file) <= {*NAMES, THRESHOLD, "W_skip"}


def read(checkpoint: Checkpoint) -> Converted:
    """One layer's transcoder."""
    takes(checkpoint)
    file, where = checkpoint.files[0], checkpoint.label
    found = checkpoint.tensors(file)
    only(found, (*NAMES, THRESHOLD, "W_skip"), where)
    d_sae, d_in = matrix(found, "W_enc", where).shape
    d_out = matrix(found, "W_dec", where).shape[1]
    tensors = {
        "W_enc": found["W_enc"].T,
        "W_dec": shaped(found, "W_dec", (d_sae, d_out), where),
        "b_enc": shaped(found, "b_enc", (d_sae,), where),
        "b_dec": shaped(found, "b_dec", (d_out,), where),
    }
    values: dict[str, Any] = {"d_in": d_in, "d_out": d_out, "d_sae": d_sae, "apply_b_dec_to_input": False}
    values["activation"] = "jumprelu" if THRESHOLD in found else "relu"
    if THRESHOLD in found:
        one_for_all = found[THRESHOLD].numel() == 1
        threshold = found[THRESHOLD].reshape(1).expand(d_sae) if one_for_all else found[THRESHOLD]
        tensors["threshold"] = shaped({THRESHOLD: threshold}, THRESHOLD, (d_sae,), where)
    if "W_skip" in found:
        tensors["W_skip"] = shaped(found, "W_skip", (d_out, d_in), where)
        values["skip_connection"] = True
    warnings: list[str] = []
    values.update(_about(checkpoint, file, warnings))
    return Converted(values, tensors, warnings)


def _about(checkpoint: Checkpoint, file: str, warnings: list[str]) -> dict[str, Any]:
    """Place and base, by the set's config."""
    beside = checkpoint.within(checkpoint.folder)
    if not beside.has(CONFIG):  # some sets of Qwen 3 have none, and their repositories' names say the model
        size = re.search(r"qwen3-([\d.]+)b", whole_name(checkpoint))
        base = {"base_model": f"Qwen/Qwen3-{size[1]}B"} if size else {}
        said = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"} if size else {}
    else:
        said, where = beside.yaml(CONFIG), f"{beside.label}/{CONFIG}"
        if (kind := text(said, "model_kind", where) or KIND) != KIND:
            raise ValueError(f"`model_kind` in {where} must be {KIND!r}; others are not read. Received: {kind!r}.")
        name = text(said, "model_name", where)
        base = {"base_model": name} if name else {}
    if not said.get("feature_input_hook"):
        warnings.append(f"{CONFIG} does not say where it reads; it has no place until `layer` and `site` give it one.")
        return {"metadata": base}
    block = f"blocks.{(re.fullmatch(FILE, file) or ['', '0'])[1]}"
    place, more = place_of_hooks(f"{block}.{said['feature_input_hook']}", f"{block}.{said.get('feature_output_hook')}")
    warnings += more
    return {**place, "metadata": base}


def write(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Write one layer's transcoder and, where it is not there, the config of the set; gives the file's name.

    circuit-tracer wants a transcoder for every layer from 0, all of one size: write each into the same folder.

    Raises:
        ValueError: circuit-tracer has no such transcoder, or the folder's set is for other hooks or another model.
        OSError: the folder cannot be written.
    """
    said, stored = _config(config), without_input_scale(config, tensors, FORM)
    stored.pop("feature_max", None)
    if "threshold" in stored:
        stored[THRESHOLD] = stored.pop("threshold").expand(config.d_sae)
    encoder = stored["W_dec"] if "W_enc" not in stored else stored["W_enc"].T
    stored["W_enc"] = encoder.detach().clone(memory_format=torch.contiguous_format)
    file = f"layer_{config.layer}.safetensors"
    with locked_folder(folder):
        if (path := folder / CONFIG).exists():
            there = Checkpoint(str(folder)).yaml(CONFIG)
            for name, value in said.items():
                if there.get(name) != value:
                    raise ValueError(
                        f"`{name}` of the set in {folder} must be {there.get(name)!r}, as that of its other "
                        f"transcoders. Received: {value!r}."
                    )
        save_tensors(folder / file, stored)
        if not path.exists():
            write_whole(path, yaml.safe_dump(said, sort_keys=False))
    return file


def _config(config: Any) -> dict[str, Any]:
    if config.layer is None or config.site not in SITE_NAMES:
        raise refuse("layer", config.layer, FORM, "a transcoder has the number of its block there")
    out = (config.hook_out or "").split(".")
    if len(out) != 3 or out[:2] != ["layers", str(config.layer)] or out[2] not in SITE_NAMES:
        raise refuse("hook_out", config.hook_out, FORM, "it takes transcoders that write in the block where they read")
    if config.activation not in ("relu", "jumprelu", "batch_topk"):
        raise refuse("activation", config.activation, FORM, "it knows relu and one threshold a latent")
    for name, able in (("normalization", ("none", "scalar")), ("apply_b_dec_to_input", (False,)), ("glu", (False,))):
        if getattr(config, name) not in able:
            raise refuse(name, getattr(config, name), FORM)
    return {
        "model_kind": KIND,
        "model_name": config.metadata.get("base_model") or "",
        "feature_input_hook": SITE_NAMES[config.site],
        "feature_output_hook": SITE_NAMES[out[2]],
    }


FORMAT = Format(FORM, FILE, recognise, read, write, one_file=True)
