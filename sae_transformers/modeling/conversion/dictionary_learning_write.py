"""An SAE as dictionary_learning 0.1.0 reads it: `config.json` and `ae.pt`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..output_files import locked_folder, whole_file, write_whole
from .format import refuse, row_norms, without_input_scale

FORM = "dictionary_learning"
# Ours, and whether b_dec is subtracted from the input -> theirs.
CLASSES = {
    ("relu", True): "AutoEncoder",
    ("relu", False): "AutoEncoderNew",
    ("gated", True): "GatedAutoEncoder",
    ("topk", True): "AutoEncoderTopK",
    ("batch_topk", True): "BatchTopKSAE",
    ("jumprelu", False): "JumpReluAutoEncoder",
}
TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerNew",
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}


def write(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a dictionary of one of the seven classes; latents and reconstructions are the same there.

    `batch_topk` becomes a `MatryoshkaBatchTopKSAE` where the metadata has its `group_sizes`. `tied` weights are two
    matrices; the scale of `normalization="scalar"` is folded into the weights.

    Raises:
        ValueError: dictionary_learning has no such SAE.
        OSError: the folder cannot be written.
    """
    name = _class(config)
    weights = without_input_scale(config, tensors, FORM)
    if name == "AutoEncoder":
        norms = row_norms(weights["W_dec"])
        if not torch.allclose(norms, torch.ones_like(norms)):
            raise refuse(
                "W_dec",
                f"rows with norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}",
                FORM,
                "its loader divides the rows of a relu SAE by their norms and multiplies the latents with them: do "
                "that first (W_enc and b_enc times the norms, W_dec divided by them)",
            )
    stored = _tensors(config, weights, name)
    with locked_folder(folder):
        with (
            whole_file(folder / "ae.pt") as draft,
            draft.open("wb") as file,
        ):
            torch.save(stored, file)  # with a path, the draft's name would be in it
        write_whole(folder / "config.json", json.dumps(_config(config, name), indent=4) + "\n")


def _class(config: Any) -> str:
    for name in ("skip_connection", "glu", "scaled_selection"):
        if getattr(config, name):
            raise refuse(name, True, FORM)
    if config.d_out != config.d_in:
        raise refuse("d_out", config.d_out, FORM, f"it would have to be d_in={config.d_in}")
    if config.hook_out is not None:
        raise refuse("hook_out", config.hook_out, FORM, "it has no transcoders")
    if config.normalization not in ("none", "scalar"):
        raise refuse("normalization", config.normalization, FORM)
    if config.activation not in {activation for activation, _ in CLASSES}:
        raise refuse("activation", config.activation, FORM)
    name = CLASSES.get((config.activation, config.apply_b_dec_to_input))
    if name is None:
        value = config.apply_b_dec_to_input
        raise refuse("apply_b_dec_to_input", value, FORM, f"with {config.activation} it is {not value} there")
    if name == "BatchTopKSAE" and config.k is None:
        raise refuse("k", None, FORM, "it is stored with batch top-k")
    return "MatryoshkaBatchTopKSAE" if name == "BatchTopKSAE" and _groups(config) else name


def _groups(config: Any) -> list[int] | None:
    """The group sizes of a Matryoshka SAE, None where its metadata has none that fit."""
    groups = config.metadata.get("group_sizes")
    whole = isinstance(groups, (list, tuple)) and all(type(size) is int and size > 0 for size in groups)
    return list(groups) if whole and sum(groups) == config.d_sae else None


def _tensors(config: Any, weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Their state dict. Copies: a view would take the whole file that it is mapped from along."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    W_enc = weights["W_enc"] if "W_enc" in weights else weights["W_dec"].T
    stored: dict[str, Tensor] = {}
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        stored["k"] = torch.tensor(config.k, dtype=torch.int)
        stored["threshold"] = copy(weights["threshold"]) if "threshold" in weights else torch.tensor(-1.0)
    if name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        stored |= {key: copy(weights[key]) for key in ("b_enc", "W_dec", "b_dec")}
        stored["W_enc"] = copy(W_enc)
        if name == "JumpReluAutoEncoder":
            stored["threshold"] = copy(weights["threshold"])
        else:
            stored["group_sizes"] = torch.tensor(_groups(config))
        return stored
    stored["encoder.weight"], stored["decoder.weight"] = copy(W_enc.T), copy(weights["W_dec"].T)
    if name == "GatedAutoEncoder":
        names = {"gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag", "decoder_bias": "b_dec"}
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
        names = {"encoder.bias": "b_enc", bias: "b_dec"}
    return stored | {theirs: copy(weights[ours]) for theirs, ours in names.items()}


def _config(config: Any, name: str) -> dict[str, Any]:
    hook = config.hook if config.hook is not None else f"{config.site}_layer_{config.layer}"
    trainer = {
        "trainer_class": TRAINERS[name],
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.d_sae,
        "k": config.k,
        "group_sizes": _groups(config) if name == "MatryoshkaBatchTopKSAE" else None,
        "layer": config.layer,
        "lm_name": config.metadata.get("base_model"),
        "submodule_name": hook if config.placed else None,
    }
    buffer = {"d_submodule": config.d_in, "io": "out", "ctx_len": config.metadata.get("context_length")}
    return {
        "trainer": {key: value for key, value in trainer.items() if value is not None},
        "buffer": {key: value for key, value in buffer.items() if value is not None},
    }
