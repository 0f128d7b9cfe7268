"""An SAE as SAELens 6.54 reads it: `cfg.json` with `metadata`, and `sae_weights.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..output_files import locked_folder, write_whole
from .format import SITE_NAMES, refuse, save_tensors, without_input_scale

FORM = "SAELens"
# SAELens reads a config without a version, or with one below 6, as one from before 6.0.
LAYOUT = "6.54.12"
ARCHITECTURES = {
    "relu": "standard",
    "gated": "gated",
    "topk": "topk",
    "abs_topk": "abstopk",
    "jumprelu": "jumprelu",
    "batch_topk": "jumprelu",
}
TRANSCODERS = {
    ("relu", False): "transcoder",
    ("relu", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
# Ours -> theirs.
NORMALIZATIONS = {"none": "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
# Ours -> theirs, of what a config's metadata may say.
FACTS = {
    "base_model": "model_name",
    "context_length": "context_size",
    "prepend_bos": "prepend_bos",
    "processing": "model_from_pretrained_kwargs",
    "neuronpedia_id": "neuronpedia_id",
}


def write(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write an SAE or a transcoder; latents and reconstructions are the same there.

    What SAELens has no word for is said otherwise: `batch_topk` is `jumprelu` with one threshold for all, as SAELens
    saves its own; `tied` weights are two matrices; the scale of `normalization="scalar"` is folded into the weights.

    Raises:
        ValueError: SAELens has no such SAE.
        OSError: the folder cannot be written.
    """
    said, stored = _config(config), _tensors(config, tensors)
    said["dtype"] = str(stored["W_dec"].dtype).removeprefix("torch.")
    with locked_folder(folder):
        save_tensors(folder / "sae_weights.safetensors", stored)
        write_whole(folder / "cfg.json", json.dumps(said, indent=2) + "\n")


def _config(config: Any) -> dict[str, Any]:
    transcoder = config.hook_out is not None or config.d_out != config.d_in or config.skip_connection
    normalizes = config.normalization in ("layer_norm", "constant_norm")
    transcoder = transcoder or (normalizes and not config.normalize_output)
    if config.activation not in ARCHITECTURES:
        raise refuse("activation", config.activation, FORM)
    for name in ("glu", "scaled_selection"):
        if getattr(config, name):
            raise refuse(name, True, FORM)
    if config.normalization == "layer_norm" and config.layer_norm_eps != 1e-5:
        raise refuse("layer_norm_eps", config.layer_norm_eps, FORM, "it is 1e-5 there")
    said: dict[str, Any] = {
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": NORMALIZATIONS.get(config.normalization, "none"),
        "reshape_activations": "hook_z" if config.site == "attn_heads" and not transcoder else "none",
    }
    if transcoder:
        activation = "jumprelu" if config.activation == "batch_topk" else config.activation
        if (activation, config.skip_connection) not in TRANSCODERS:
            raise refuse("activation", config.activation, FORM, "transcoders have relu or jumprelu")
        if config.apply_b_dec_to_input:
            raise refuse("apply_b_dec_to_input", True, FORM, "transcoders subtract no bias")
        if normalizes and config.normalize_output:
            raise refuse("normalize_output", True, FORM, "transcoders normalise their input only")
        said.update(architecture=TRANSCODERS[activation, config.skip_connection], d_out=config.d_out)
    else:
        said["architecture"] = ARCHITECTURES[config.activation]
    if said["architecture"] in ("topk", "abstopk"):
        said.update(k=config.k, rescale_acts_by_decoder_norm=False)
    said["metadata"] = _metadata(config, config.write_at if transcoder and config.placed else None)
    return said


def _metadata(config: Any, out: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"sae_lens_version": LAYOUT, "sae_lens_training_version": None}
    said |= {theirs: config.metadata[ours] for ours, theirs in FACTS.items() if config.metadata.get(ours) is not None}
    if config.layer is not None:
        said["hook_name"] = f"blocks.{config.layer}.{SITE_NAMES[config.site]}"
    elif config.hook is not None:
        said["hf_hook_name"] = config.hook
    if out is not None:
        parts = out.split(".")
        if len(parts) == 3 and parts[0] == "layers" and parts[2] in SITE_NAMES:
            said["hook_name_out"] = f"blocks.{parts[1]}.{SITE_NAMES[parts[2]]}"
        else:
            said["hf_hook_name_out"] = out
    for name in ("concepts", "feature_names"):
        if getattr(config, name):
            said[name] = dict(getattr(config, name))
    return said


def _tensors(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored = without_input_scale(config, tensors, FORM)
    stored.pop("feature_max", None)
    if "W_enc" not in stored:  # tied; safetensors stores no memory twice
        stored["W_enc"] = stored["W_dec"].detach().T.clone(memory_format=torch.contiguous_format)
    if config.activation == "batch_topk":
        stored["threshold"] = stored["threshold"].expand(config.d_sae)
    return stored
