"""SAELens: `cfg.json` and `sae_weights.safetensors`, from before 3.0 to 6.54, for inference and from training.

    x1  = norm(x) - b_dec                          (b_dec only where `apply_b_dec_to_input`)
    pre = x1 @ W_enc + b_enc
    out = unnorm(latents @ W_dec + b_dec)          (transcoders: no unnorm; skip transcoders: + x @ W_skip.T)

`rescale_acts_by_decoder_norm` (top-k and batch top-k): latents are pre-activations times the norms of their decoder
rows, which decoding divides out; both are folded here, as SAELens does when it saves for inference.
`sparsity.safetensors`, where it is there: `sparsity` (d_sae,), log10(firing frequency in training + 1e-10), which the
SAE does not compute with; `published_sparsity` reads it when it is asked for.
`expected_average_only_in`: x was multiplied by a scale that no file holds; SAELens runs such files as they are.

Source: https://github.com/decoderesearch/SAELens, sae_lens/saes and sae_lens/loading/pretrained_sae_loaders.py (6.54).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .format import (
    Converted,
    Format,
    agree,
    by_columns,
    by_rows,
    flag,
    given_or_stated,
    matrix,
    need,
    no_other_words,
    number,
    only,
    place_as_text,
    place_of_hook,
    row_norms,
    shaped,
    takes,
    text,
)
from .saelens_write import NORMALIZATIONS, write

WORDS = ("architecture", "activation_fn", "activation_fn_str")
CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
UNFOLDED = "expected_average_only_in"


class Kind(NamedTuple):
    """What an `architecture` means."""

    activation: str
    transcoder: bool = False
    skip: bool = False


KINDS = {
    "standard": Kind("relu"),
    "gated": Kind("gated"),
    "topk": Kind("topk"),
    "abstopk": Kind("abs_topk"),
    "jumprelu": Kind("jumprelu"),
    "transcoder": Kind("relu", transcoder=True),
    "skip_transcoder": Kind("relu", transcoder=True, skip=True),
    "jumprelu_transcoder": Kind("jumprelu", transcoder=True),
    "jumprelu_skip_transcoder": Kind("jumprelu", transcoder=True, skip=True),
    # Training checkpoints; saved for inference they are jumprelu.
    "batchtopk": Kind("batch_topk"),
    "matryoshka_batchtopk": Kind("batch_topk"),
}
# What TransformerLens can do to weights that changes activations: raw Hugging Face hidden states then do not fit.
PROCESSING = (
    "center_writing_weights",
    "center_unembed",
    "fold_ln",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def recognise(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS)


def read(checkpoint: Checkpoint) -> Converted:
    """One SAE, transcoder or training checkpoint."""
    said, where = checkpoint.json(CONFIG), f"{checkpoint.label}/{CONFIG}"
    about = said.get("metadata")
    if not isinstance(about, Mapping | None):
        raise ValueError(f"`metadata` in {where} must be an object. Received: metadata={about!r}.")
    about = {**said, **(about or {})}
    said, kind = _modernised(said, about, where)
    if "normalize_activations" in checkpoint.given:  # SAELens' registry knows better than some files
        said["normalize_activations"] = checkpoint.given["normalize_activations"]
    stored, weights = checkpoint.tensors(WEIGHTS), f"{checkpoint.label}/{WEIGHTS}"

    (d_in, d_sae), d_out = matrix(stored, "W_enc", weights).shape, matrix(stored, "W_dec", weights).shape[1]
    agree(said, {"d_in": d_in, "d_sae": d_sae, **({"d_out": d_out} if kind.transcoder else {})}, where)
    subtracts = flag(said, "apply_b_dec_to_input", where, default=not kind.transcoder)
    if kind.transcoder and subtracts:
        raise ValueError(f"Transcoders subtract no bias. Received: apply_b_dec_to_input=True in {where}.")
    values: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "activation": kind.activation,
        "apply_b_dec_to_input": subtracts,
    }
    if kind.transcoder:
        values.update(d_out=d_out, skip_connection=kind.skip)
    if kind.activation in ("topk", "abs_topk"):
        values["k"] = given_or_stated(checkpoint, said, "k", where)
    elif kind.activation == "batch_topk":
        k = number(said, "k", where, default=None)
        values["k"] = int(k) if k is not None and k.is_integer() else None

    takes(
        checkpoint,
        "normalize_activations",
        *(("k",) if kind.activation in ("topk", "abs_topk") and said.get("k") is None else ()),
        *(("input_scale",) if said.get("normalize_activations") == UNFOLDED else ()),
    )
    warnings: list[str] = []
    values.update(_normalization(checkpoint.given, said, kind, where, warnings))
    values.update(_place(about, kind, where, warnings))
    values["metadata"] = _metadata(about, where, warnings)
    if checkpoint.has(SPARSITY):
        revision = checkpoint.hub.get("revision")
        values["metadata"]["sparsity"] = {"file": SPARSITY, **({"revision": revision} if revision else {})}
    for name in ("concepts", "feature_names"):  # what `write` keeps of ours
        if isinstance(about.get(name), Mapping):
            values[name] = dict(about[name])
    tensors = _tensors(stored, said, kind, d_sae, d_out, where, weights)
    return Converted(values, tensors, warnings)


def _modernised(said: dict[str, Any], about: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Kind]:
    """A config in the terms of 6.x, as the library's `handle_pre_6_0_config` reads it, and its architecture."""
    said = dict(said)
    no_other_words(said, WORDS, where)
    version = text(about, "sae_lens_version", where)
    architecture = text(said, "architecture", where)
    if version is None or int((re.match(r"\d{1,9}", version) or ["0"])[0]) < 6:
        if architecture is None and not {"hook_point", "hook_name", *WORDS} & set(said):
            raise ValueError(
                f"{where} is no config of SAELens: it says neither `architecture` nor `hook_name`, as every release "
                f"of it does (the first ones `hook_point`). Received: {', '.join(sorted(said)) or 'nothing'}."
            )
        architecture = architecture or "standard"
        function = text(said, "activation_fn_str", where) or text(said, "activation_fn", where) or "relu"
        arguments = said.get("activation_fn_kwargs")
        if function == "topk" and architecture in ("standard", "topk"):
            architecture = "topk"
        elif function != "relu":
            raise ValueError(
                f"Activation functions that can be read are relu and topk. Received: activation_fn={function!r} in "
                f"{where}, architecture={architecture!r}."
            )
        if architecture == "topk" and isinstance(arguments, Mapping) and "k" in arguments:
            said["k"] = arguments["k"]
        if isinstance(said.get("normalize_activations"), bool):
            said["normalize_activations"] = UNFOLDED if said["normalize_activations"] else "none"
    if architecture not in KINDS:
        raise ValueError(
            f"{where} describes no SAE that this library can compute: its encoder is not one affine map followed by "
            f"one activation. Known: {', '.join(KINDS)}. Received: architecture={architecture!r}."
        )
    return said, KINDS[architecture]


def _normalization(
    given: Mapping[str, Any], said: Mapping[str, Any], kind: Kind, where: str, warnings: list[str]
) -> dict[str, Any]:
    name = text(said, "normalize_activations", where) or "none"
    if (text(said, "reshape_activations", where) or "none") not in ("none", "hook_z"):
        raise ValueError(
            f"`reshape_activations` in {where} must be 'none' or 'hook_z'. Received: {said['reshape_activations']!r}."
        )
    if name == UNFOLDED:
        scale = number(given, "input_scale", "the options", default=None)
        if scale is not None:
            return {"normalization": "scalar", "input_scale": scale}
        warnings.append(
            f"it was trained on hidden states times a scale (normalize_activations={UNFOLDED!r}) that no file "
            f"holds. Without `input_scale=` its latents are wrong."
        )
        return {}
    ours = {theirs: ours for ours, theirs in NORMALIZATIONS.items()}
    if name not in ours:
        raise ValueError(
            f"`normalize_activations` in {where} must be one of {', '.join((*ours, UNFOLDED))}; "
            f"others are not supported. Received: {name!r}."
        )
    if name == "none":
        return {}
    return {"normalization": ours[name], **({"normalize_output": False} if kind.transcoder else {})}


def _place(about: Mapping[str, Any], kind: Kind, where: str, warnings: list[str]) -> dict[str, Any]:
    """Where it stands, by its TransformerLens name, else by its Hugging Face one; a transcoder needs both ends."""
    hook = text(about, "hook_name", where) or text(about, "hook_point", where)
    head = number(about, "hook_head_index", where, kind=int, default=None)
    if head is None:
        head = number(about, "hook_point_head_index", where, kind=int, default=None)
    if head is not None:
        warnings.append(f"it reads head {head} alone, which no place in a Hugging Face model gives; it has no place.")
        return {}
    module = text(about, "hf_hook_name", where)
    place = place_of_hook(hook) or ({"hook": module} if module else {})
    if not kind.transcoder or not place:
        return place
    out = place_as_text(text(about, "hook_name_out", where)) or text(about, "hf_hook_name_out", where)
    if out == (place_as_text(hook) or module):
        return place
    return {**place, "hook_out": out} if out else {}


def _metadata(about: Mapping[str, Any], where: str, warnings: list[str]) -> dict[str, Any]:
    processing = about.get("model_from_pretrained_kwargs")
    if not isinstance(processing, Mapping | None):
        raise ValueError(f"`model_from_pretrained_kwargs` in {where} must be an object. Received: {processing!r}.")
    if done := [name for name in PROCESSING if (processing or {}).get(name)]:
        warnings.append(
            f"it was trained on a model whose weights TransformerLens changed ({', '.join(done)}): the hidden states "
            f"of the Hugging Face model do not fit it as they are."
        )
    elif "hook_point" in about and processing is None:
        warnings.append(
            "it is from before SAELens 3, whose configs do not say how the model's weights were changed. Many were "
            "trained with centred weights (center_writing_weights): raw Hugging Face hidden states do not fit those."
        )
    hook = text(about, "hook_name", where) or text(about, "hook_point", where)
    found = {
        "base_model": text(about, "model_name", where),
        "context_length": number(about, "context_size", where, kind=int, default=None),
        "prepend_bos": about.get("prepend_bos"),
        "processing": dict(processing) if processing else None,
        "original_hook": hook,
        "original_hook_out": text(about, "hook_name_out", where),
        "hook_head_index": about.get("hook_head_index"),
        "sae_lens_version": text(about, "sae_lens_version", where),
        "training_architecture": text(about, "training_architecture", where),
        "neuronpedia_id": text(about, "neuronpedia_id", where),
    }
    return {name: value for name, value in found.items() if value is not None}


def _tensors(
    stored: Mapping[str, Tensor],
    said: Mapping[str, Any],
    kind: Kind,
    d_sae: int,
    d_out: int,
    where: str,
    weights: str,
) -> dict[str, Tensor]:
    """Ours, by what SAELens' own loaders do."""
    names = ("b_gate", "b_mag", "r_mag") if kind.activation == "gated" else ("b_enc",)
    names = ("W_enc", "W_dec", "b_dec", *names, *(("W_skip",) if kind.skip else ()))
    need(stored, names, weights)
    tensors = {name: stored[name] for name in names}
    shaped(stored, "W_dec", (d_sae, d_out), weights)
    known = {*names, "scaling_factor", "finetuning_scaling_factor"}
    if kind.activation == "jumprelu":
        known |= {"threshold", "log_threshold"}
        if "threshold" not in stored and "log_threshold" in stored:
            logarithm = shaped(stored, "log_threshold", (d_sae,), weights)
            tensors["threshold"] = logarithm.float().exp()
        else:
            tensors["threshold"] = shaped(stored, "threshold", (d_sae,), weights)
    elif kind.activation == "batch_topk":
        known |= {"topk_threshold"}
        tensors["threshold"] = shaped(stored, "topk_threshold", (), weights)
    only(stored, tuple(known), weights)

    # Versions before 6 scaled latents in decoding after a fine-tuning; the latents themselves are before the factor.
    factor = next((stored[name] for name in ("scaling_factor", "finetuning_scaling_factor") if name in stored), None)
    if factor is not None:
        name = "scaling_factor" if "scaling_factor" in stored else "finetuning_scaling_factor"
        factor = shaped(stored, name, (d_sae,), weights).float()
        if not torch.allclose(factor, torch.ones_like(factor)):
            if not flag(said, "finetuning_scaling_factor", where, default=False):
                raise ValueError(
                    f"{weights} holds a {name} that is not 1 everywhere. Received: finetuning_scaling_factor=False."
                )
            tensors["W_dec"] = by_rows(tensors["W_dec"], factor)

    rescales = kind.activation in ("topk", "abs_topk", "batch_topk")
    # The default of 6.54: on where batch top-k trains, off for inference files.
    if rescales and flag(said, "rescale_acts_by_decoder_norm", where, default=kind.activation == "batch_topk"):
        shaped(stored, "W_enc", (stored["W_enc"].shape[0], d_sae), weights)
        norms = row_norms(tensors["W_dec"])
        if not torch.equal(norms, torch.ones_like(norms)):
            tensors["W_enc"] = by_columns(tensors["W_enc"], norms)
            tensors["b_enc"] = by_columns(shaped(stored, "b_enc", (d_sae,), weights), norms)
            tensors["W_dec"] = by_rows(tensors["W_dec"], 1 / norms.clamp(min=1e-8))
    return tensors


class PublishedSparsity(NamedTuple):
    """values: (d_sae,) float64, log10 of each latent's firing frequency, -10 for one that never fired. source: the
    file that they are from."""

    values: Tensor
    source: str


def published_sparsity(config: Any) -> PublishedSparsity | None:
    """How often each latent fired in training, as it was published beside an SAE's weights.

    Args:
        config: of the SAE, whose `metadata` names the folder or repository that it was read from.

    Returns:
        None where nothing was published.

    Raises:
        OSError: the file is no longer where the SAE was read.
        ValueError: it holds something else.
    """
    said, source = config.metadata.get("sparsity"), config.metadata.get("source")
    if not isinstance(said, Mapping) or not isinstance(source, str):
        return None
    name, parts = str(said["file"]), source.split("/")
    hub = {"revision": said["revision"]} if said.get("revision") else {}
    local = Path(source).exists()
    checkpoint = Checkpoint(source) if local else Checkpoint("/".join(parts[:2]), "/".join(parts[2:]), hub)
    where = f"{checkpoint.label}/{name}"
    if not checkpoint.has(name):
        raise OSError(f"There is no {where}.")
    values = shaped(checkpoint.tensors(name), "sparsity", (config.d_sae,), where).double()
    if not bool(torch.isfinite(values).all()) or float(values.max()) > 1e-6:
        raise ValueError(f"`sparsity` in {where} must be log10 of frequencies, 0 or less. Received: {values.max():g}.")
    return PublishedSparsity(values, where)


FORMAT = Format("saelens", r"sae_weights\.safetensors", recognise, read, write)
