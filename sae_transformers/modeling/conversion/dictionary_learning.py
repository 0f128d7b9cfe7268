"""dictionary_learning (saprmarks): `config.json` and `ae.pt`, a state dict or what an interrupted run leaves.

    AutoEncoder             z = relu(enc(x - bias))               its loader makes decoder rows unit norm: so here
    AutoEncoderNew          z = relu(enc(x))
    GatedAutoEncoder        a = enc(x - decoder_bias); z = relu(exp(r_mag) * a + mag_bias) where a + gate_bias > 0
    AutoEncoderTopK         z = top-k of relu(enc(x - b_dec))     the threshold is not used
    BatchTopKSAE, MatryoshkaBatchTopKSAE   z = relu(enc(x - b_dec)) where it exceeds the threshold
    JumpReluAutoEncoder     z = relu(pre) where pre = x @ W_enc + b_enc exceeds its latent's threshold

An interrupted run leaves `{step, ae, optimizer, config, norm_factor}`, whose biases and thresholds belong to
x / norm_factor; a finished run has multiplied them by norm_factor (`scale_biases`).

Source: https://github.com/saprmarks/dictionary_learning, dictionary.py, trainers/ and training.py (0.1.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configuration_sparse_autoencoder import SITES
from .checkpoint import Checkpoint
from .dictionary_learning_write import write
from .format import (
    Converted,
    Format,
    agree,
    by_columns,
    by_rows,
    matrix,
    need,
    no_other_words,
    number,
    only,
    row_norms,
    shaped,
    takes,
    text,
)

CONFIG, WEIGHTS = "config.json", "ae.pt"


class Kind(NamedTuple):
    """What a `dict_class` means: our activation, and our names -> theirs (`.T` for what is transposed)."""

    activation: str
    subtracts: bool
    names: dict[str, str]
    buffers: tuple[str, ...] = ()


LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
KINDS = {
    "AutoEncoder": Kind("relu", True, {**LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": Kind("relu", False, {**LINEAR, "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": Kind(
        "gated",
        True,
        {
            "W_enc": "encoder.weight.T",
            "W_dec": "decoder.weight.T",
            "b_dec": "decoder_bias",
            "b_gate": "gate_bias",
            "b_mag": "mag_bias",
            "r_mag": "r_mag",
        },
    ),
    "AutoEncoderTopK": Kind("topk", True, {**LINEAR, "b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": Kind("batch_topk", True, {**LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, ("k",)),
    "MatryoshkaBatchTopKSAE": Kind(
        "batch_topk", True, {**PLAIN, "threshold": "threshold"}, ("k", "group_sizes")
    ),
    "JumpReluAutoEncoder": Kind("jumprelu", False, {**PLAIN, "threshold": "threshold"}),
}  # fmt: skip


def recognise(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS)


def read(checkpoint: Checkpoint) -> Converted:
    """One dictionary, of a finished or an interrupted run."""
    whole, where = checkpoint.json(CONFIG), f"{checkpoint.label}/{CONFIG}"
    trainer, buffer = _section(whole, "trainer", where), _section(whole, "buffer", where)
    no_other_words(trainer, ("dict_class",), where)
    name = text(trainer, "dict_class", where)
    if name not in KINDS:
        raise ValueError(f"`dict_class` in {where} must be one of {', '.join(KINDS)}. Received: dict_class={name!r}.")
    kind, weights = KINDS[name], f"{checkpoint.label}/{WEIGHTS}"
    stored, factor = _stored(checkpoint.pickled(WEIGHTS), weights)
    tensors = _tensors(stored, kind, weights)
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    agree(trainer, {"activation_dim": d_in, "dict_size": d_sae}, where)
    shaped(tensors, "W_dec", (d_sae, d_out), weights)
    takes(checkpoint, *(("k",) if "k" in kind.buffers and "k" not in stored and trainer.get("k") is None else ()))
    warnings: list[str] = []
    values: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "activation": kind.activation,
        "apply_b_dec_to_input": kind.subtracts,
        **_place(trainer, buffer, where),
    }
    if "k" in kind.buffers:
        values["k"] = _k(checkpoint.given, trainer, stored, where, weights)
    if kind.activation == "batch_topk":
        threshold = float(shaped(tensors, "threshold", (), weights))
        if threshold < 0:
            warnings.append("its threshold was never set (training was too short): every positive latent is active.")
    if factor != 1.0:
        tensors.update(_unscaled(tensors, factor, d_sae, weights))
    if name == "AutoEncoder":
        tensors.update(_unit_norm(tensors, d_sae, weights))
    values["metadata"] = _metadata(name, trainer, buffer, stored, where, weights, d_sae)
    return Converted(values, tensors, warnings)


def _section(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = values.get(name, {} if name == "buffer" else None)
    if name == "buffer" and found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"`{name}` in {where} must be an object. Received: {name}={found!r}.")
    return found


def _stored(found: Mapping[str, Any], weights: str) -> tuple[dict[str, Tensor], float]:
    """The state dict, and what its biases and thresholds still have to be multiplied by."""
    factor = 1.0
    if isinstance(found.get("ae"), Mapping):
        factor = found.get("norm_factor")
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        # A run that did not normalise its activations has no factor.
        factor = 1.0 if factor is None else number({"norm_factor": factor}, "norm_factor", weights)
        if factor <= 0:
            raise ValueError(f"`norm_factor` in {weights} must be positive. Received: norm_factor={factor!r}.")
        found = found["ae"]
    if others := sorted(str(name) for name, value in found.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{weights} holds {', '.join(others)}, which are no tensors.")
    return {str(name): value for name, value in found.items()}, factor


def _tensors(stored: dict[str, Tensor], kind: Kind, weights: str) -> dict[str, Tensor]:
    names = tuple(theirs.removesuffix(".T") for theirs in kind.names.values())
    need(stored, names, weights)
    only(stored, (*names, *kind.buffers), weights)
    for theirs in names:
        if theirs in ("W_enc", "W_dec") or theirs.endswith(".weight"):
            matrix(stored, theirs, weights)
    return {
        ours: stored[theirs.removesuffix(".T")].T if theirs.endswith(".T") else stored[theirs]
        for ours, theirs in kind.names.items()
    }


def _k(
    given: Mapping[str, Any], trainer: Mapping[str, Any], stored: Mapping[str, Tensor], where: str, weights: str
) -> int:
    """Latents per token, stated in the config, in the weights or by the caller; all that speak must agree."""
    spoken = {"the options": given.get("k"), where: trainer.get("k")}
    if "k" in stored:
        if stored["k"].numel() != 1:
            raise ValueError(f"k in {weights} must be one number. Received: shape {tuple(stored['k'].shape)}.")
        spoken[weights] = stored["k"].item()
    found = {place: number({"k": value}, "k", place, kind=int) for place, value in spoken.items() if value is not None}
    if len(set(found.values())) != 1 or min(found.values()) < 1:
        said = ", ".join(f"k={value} in {place}" for place, value in found.items()) or "none"
        raise ValueError(f"{weights} needs one `k` of at least 1; give `k=` where it states none. Received: {said}.")
    return next(iter(found.values()))


def _unscaled(tensors: Mapping[str, Tensor], factor: float, d_sae: int, weights: str) -> dict[str, Tensor]:
    """What `scale_biases(factor)` does at the end of a run; a negative threshold is an unset one."""
    found: dict[str, Tensor] = {}
    for name in ("b_enc", "b_gate", "b_mag", "b_dec", "threshold"):
        if name in tensors:
            value = shaped(tensors, name, tuple(tensors[name].shape), weights)
            unset = name == "threshold" and value.ndim == 0 and float(value) < 0
            found[name] = value if unset else by_columns(value, torch.tensor(factor))
    return found


def _unit_norm(tensors: Mapping[str, Tensor], d_sae: int, weights: str) -> dict[str, Tensor]:
    """`AutoEncoder.normalize_decoder`: latents times the norms of their decoder rows."""
    norms = row_norms(tensors["W_dec"])
    if torch.allclose(norms, torch.ones_like(norms)):
        return {}
    b_enc = shaped(tensors, "b_enc", (d_sae,), weights)
    W_enc = shaped(tensors, "W_enc", tuple(tensors["W_enc"].shape), weights)
    return {
        "W_enc": by_columns(W_enc, norms),
        "b_enc": by_columns(b_enc, norms),
        "W_dec": by_rows(tensors["W_dec"], 1 / norms.clamp(min=1e-8)),
    }


def _place(trainer: Mapping[str, Any], buffer: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Where it stands, where the name of its submodule is clear: `resid_post_layer_8`, or a module path."""
    name = text(trainer, "submodule_name", where) or ""
    layer = number(trainer, "layer", where, kind=int, default=None)
    if (text(buffer, "io", where) or "out") != "out":
        return {}
    match = re.fullmatch(r"(\w+?)_layer_(\d{1,6})", name)
    if match and match[1] in SITES and layer in (None, int(match[2])):
        return {"layer": int(match[2]), "site": match[1]}
    return {"hook": name} if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name) else {}


def _metadata(
    name: str,
    trainer: Mapping[str, Any],
    buffer: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    where: str,
    weights: str,
    d_sae: int,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "base_model": text(trainer, "lm_name", where),
        "context_length": number(buffer, "ctx_len", where, kind=int, default=None),
        "original_hook": text(trainer, "submodule_name", where),
        "dict_class": name,
        "trainer_class": text(trainer, "trainer_class", where),
    }
    if "group_sizes" in stored and name == "MatryoshkaBatchTopKSAE":
        groups = [int(size) for size in stored["group_sizes"].flatten().tolist()]
        if sum(groups) != d_sae or min(groups, default=0) < 1:
            raise ValueError(f"group_sizes in {weights} must add up to {d_sae}. Received: {groups}.")
        found["group_sizes"] = groups
    return {key: value for key, value in found.items() if value is not None}


FORMAT = Format("dictionary_learning", r"ae\.pt", recognise, read, write)
