"""SCAR: an SAE among the tensors of its language model, under `SAE.`, with its settings in the model's `config.json`.

    x      = layer_norm(hidden) - pre_bias
    z      = act(x @ encoder.weight.T + latent_bias)
    output = (z @ decoder.weight.T + pre_bias) * std + mean

"SCAR: sparse conditioned autoencoders for concept detection and steering in LLMs"
(https://huggingface.co/papers/2411.07122), https://github.com/ml-research/SCAR, https://huggingface.co/AIML-TUDA/SCAR.
Only the files that hold the SAE are opened, or fetched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .format import Converted, Format, agree, matrix, no_other_words, number, only, shaped, takes, text, whole_name

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "SAE."
SETTINGS = {"hook_block_num", "n_inputs", "n_latents", "activation", "site"}
ACTIVATIONS = ("topk", "topk-sigmoid", "topk-tanh", "jumprelu", "relu", "identity")
SITES = {"mlp": "mlp_out", "block": "resid_post"}


def recognise(checkpoint: Checkpoint) -> bool:
    if not checkpoint.has("config.json") or not (checkpoint.has(FILE) or checkpoint.has(INDEX)):
        return False
    return set(checkpoint.json("config.json")) >= SETTINGS


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The SAE's tensors, by their names without the prefix."""
    if not checkpoint.has(INDEX):
        return checkpoint.tensors(FILE, PREFIX)
    shards = checkpoint.json(INDEX).get("weight_map")
    if not isinstance(shards, Mapping):
        raise ValueError(
            f"{INDEX} of {checkpoint.label} is damaged: `weight_map` must be an object. Download it again."
        )
    wanted = [shard for name, shard in shards.items() if name.startswith(PREFIX)]
    for shard in wanted:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ValueError(
                f"{INDEX} of {checkpoint.label} is damaged: it names {shard!r}, expected a file beside it."
            )
        if not checkpoint.has(shard):
            raise ValueError(f"{checkpoint.label} lacks {shard}, where {INDEX} says that the SAE is.")
    return {name: value for shard in sorted(set(wanted)) for name, value in checkpoint.tensors(shard, PREFIX).items()}


def _choice(config: Mapping[str, Any], name: str, known: tuple[str, ...], where: str) -> str:
    value = text(config, name, where)
    if value not in known:
        raise ValueError(f"`{name}` in {where} must be one of {', '.join(known)}. Received: {name}={value!r}.")
    return value


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    where, config = f"config.json of {checkpoint.label}", checkpoint.json("config.json")
    no_other_words(config, ("activation",), where)
    activation = _choice(config, "activation", ACTIVATIONS, where)
    names = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
    tensors, inside = _tensors(checkpoint), f"the SAE of {checkpoint.label}"
    only(tensors, names + (("threshold",) if activation == "jumprelu" else ()), inside)
    d_sae, d_in = matrix(tensors, "encoder.weight", inside).shape
    agree(config, {"n_inputs": d_in, "n_latents": d_sae}, where)
    ours = {
        "W_enc": tensors["encoder.weight"].T,
        "W_dec": shaped(tensors, "decoder.weight", (d_in, d_sae), inside).T,
        "b_enc": shaped(tensors, "latent_bias", (d_sae,), inside),
        "b_dec": shaped(tensors, "pre_bias", (d_in,), inside),
    }
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "activation": activation}
    # The config says `normalize: false`; the original code never reads it and always normalises.
    values["normalization"] = "layer_norm"
    if activation.startswith("topk"):
        values["k"] = number(config, "activation_k", where, kind=int)
    if activation == "jumprelu":
        ours["threshold"] = shaped(tensors, "threshold", (d_sae,), inside).double().exp()
    values["layer"] = number(config, "hook_block_num", where, kind=int)
    values["site"] = SITES[_choice(config, "site", tuple(SITES), where)]
    # No config says for which concept latent 0 was trained; of the published one it is known.
    if re.search("AIML-TUDA(?:/|--)SCAR(?![^/])", whole_name(checkpoint)):
        values["concepts"] = {"toxicity": 0}
    base = text(config, "base_model_name", where)
    values["metadata"] = {"conditioned_latent": 0} | ({"base_model": base} if base else {})
    return Converted(values, ours)


FORMAT = Format("SCAR", r"model\.safetensors\.index\.json", recognise, read)
