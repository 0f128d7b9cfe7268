"""EleutherAI's sparsify: `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`.

    x1  = x - b_dec                                (x for transcoders: `transcode`)
    z   = top-k or groupmax of relu(x1 @ encoder.weight.T + encoder.bias)
    out = z @ W_dec + b_dec                        (+ x @ W_skip.T)

`normalize_decoder` and `multi_topk` concern training only. The folder's name is the module it was trained on.
latentsae, a descendant, writes the same files for eight kinds of SAE and names the kind in `sae_type`; two are read.

Source: https://github.com/EleutherAI/sparsify, sparsify/sparse_coder.py and fused_encoder.py (1.3.3);
https://pypi.org/project/latentsae/, latentsae/sae.py and utils/config.py (0.2.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from ..output_files import locked_folder, write_whole
from .checkpoint import Checkpoint
from .format import (
    Converted,
    Format,
    agree,
    flag,
    given_or_stated,
    matrix,
    need,
    number,
    only,
    refuse,
    save_tensors,
    takes,
    text,
    whole_name,
    without_input_scale,
)

FORM = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ACTIVATIONS = ("topk", "groupmax")
# All that a config of sparsify ever had, from its first release on.
KEYS = {
    "activation", "d_in", "expansion_factor", "k", "multi_topk", "normalize_decoder", "num_latents", "signed",
    "skip_connection", "transcode",
}  # fmt: skip
LATENTSAE_KINDS = {"TOPK": "topk", "ABSTOPK": "abs_topk"}
# What else its configs hold without effect on these kinds: settings of the other kinds, and of training.
LATENTSAE_TRAINING = re.compile(
    "(jumprelu|k_anneal|lista|batchtopk|matryoshka|cosine)(_.+)?|skip_rank|sparsity_penalty|decorr_alpha|max_fire_rate|"
    "fire_rate_penalty|decoder_init_norm"
)
BLOCK = re.compile(r"(?:layers|h)\.(\d{1,6})")
# A block, a module inside one, or the embedding.
MODULE = re.compile(r"(?:[A-Za-z_]\w*\.)*(?:(?:layers|h|blocks)\.\d{1,6}(?:\.\w+)*|embed_tokens|embed_in|wte)")


def recognise(checkpoint: Checkpoint) -> bool:
    return checkpoint.has(CONFIG, WEIGHTS)


def read(checkpoint: Checkpoint) -> Converted:
    """One sparse coder or transcoder."""
    said, where = checkpoint.json(CONFIG), f"{checkpoint.label}/{CONFIG}"
    activation = _activation(said, where)
    stored, weights = checkpoint.tensors(WEIGHTS), f"{checkpoint.label}/{WEIGHTS}"
    (d_sae, d_in), transcode = matrix(stored, "encoder.weight", weights).shape, flag(said, "transcode", where, False)
    agree(said, {"d_in": d_in}, where)
    if number(said, "num_latents", where, kind=int, default=0):
        agree(said, {"num_latents": d_sae}, where)
    elif said.get("expansion_factor") is not None and number(said, "expansion_factor", where) * d_in != d_sae:
        raise ValueError(
            f"{where} does not fit its weights, which have {d_sae} latents of {d_in}. Received: "
            f"expansion_factor={said['expansion_factor']!r}, num_latents=0."
        )
    skip = flag(said, "skip_connection", where, False)
    names = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skip else ())}
    need(stored, tuple(sorted(names)), weights)
    only(stored, tuple(names), weights)

    takes(checkpoint, *(() if said.get("k") is not None else ("k",)))
    name = PurePosixPath(whole_name(checkpoint)).name
    values = {
        "d_in": d_in,
        "d_sae": d_sae,
        "activation": activation,
        "k": given_or_stated(checkpoint, said, "k", where),
        "apply_b_dec_to_input": not transcode,
        "skip_connection": skip,
        **place_of_folder(name, transcode),
    }
    metadata = {"original_hook": name} if MODULE.fullmatch(name) else {}
    values["metadata"] = metadata | ({"format": "latentsae"} if "sae_type" in said else {})
    tensors = {
        "W_enc": stored["encoder.weight"].T,
        "b_enc": stored["encoder.bias"],
        **{key: stored[key] for key in ("W_dec", "b_dec", "W_skip") if key in stored},
    }
    return Converted(values, tensors)


def _activation(said: Mapping[str, Any], where: str) -> str:
    """Ours, by every word of the config that has a say in it; a word that is not known may have one."""
    others = set(said) - KEYS
    if "sae_type" in said:
        kind = text(said, "sae_type", where)
        if kind not in LATENTSAE_KINDS:
            raise ValueError(
                f"`sae_type` in {where}, which latentsae wrote, must be one of {', '.join(LATENTSAE_KINDS)}: what its "
                f"others compute is not known here. Received: sae_type={kind!r}."
            )
        for name in ("use_skip", "mean_center"):
            if flag(said, name, where, False):
                raise ValueError(f"`{name}` in {where} must be false: it is not known here. Received: {name}=True.")
        others -= {"sae_type", "use_skip", "mean_center", *filter(LATENTSAE_TRAINING.fullmatch, others)}
        others |= set(said) & {"activation", "signed", "transcode", "skip_connection"}
    if others:
        raise ValueError(
            f"{where} says what {'latentsae' if 'sae_type' in said else 'sparsify'} never says, so another library "
            f"wrote it, whose mathematics are not known. Received: {', '.join(sorted(others))}."
        )
    if "sae_type" in said:
        return LATENTSAE_KINDS[said["sae_type"]]
    activation = text(said, "activation", where) or "topk"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` in {where} must be one of {', '.join(ACTIVATIONS)}. Received: activation={activation!r}."
        )
    if flag(said, "signed", where, False):
        # Versions before 1.0 kept the largest magnitudes with their sign and applied no relu.
        if activation != "topk":
            raise ValueError(f"`signed` in {where} goes with topk alone. Received: activation={activation!r}.")
        return "abs_topk"
    return activation


def place_of_folder(name: str, transcode: bool) -> dict[str, Any]:
    """Where the SAE of a folder stands: the output of a module, or for transcoders both its sides.

    Modules inside a block stay module paths. `mlp_out` is another where the block has a norm behind its MLP.
    """
    if not MODULE.fullmatch(name):
        return {}
    if transcode:
        return {"hook": f"{name}.input", "hook_out": f"{name}.output"}
    block = BLOCK.fullmatch(name)
    return {"layer": int(block[1]), "site": "resid_post"} if block else {"hook": name}


def folder_of_place(config: Any) -> str | None:
    """The folder's name that says where an SAE stands, None where it has no place.

    Raises:
        ValueError: no module's name says it.
    """
    if not config.placed:
        return None
    place = {name: getattr(config, name) for name in ("layer", "site", "hook", "hook_out")}
    place = {name: value for name, value in place.items() if value is not None}
    transcode = not config.apply_b_dec_to_input
    original = config.metadata.get("original_hook")  # GPT-2's blocks are `h.3`
    if isinstance(original, str) and place_of_folder(original, transcode) == place:
        return original
    name = f"layers.{config.layer}" if config.layer is not None else config.hook.removesuffix(".input")
    if place_of_folder(name, transcode) != place:
        raise refuse(
            "hook" if config.hook is not None else "site",
            config.hook if config.hook is not None else config.site,
            FORM,
            "an SAE stands at the output of a block or module (`layer`, or `hook='layers.3.mlp'`), a transcoder at "
            "both sides of one (`hook='layers.3.mlp.input'`, `hook_out='layers.3.mlp.output'`)",
        )
    return name


def write(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a sparse coder where sparsify looks for it: in `folder/<hookpoint>`, or in `folder` itself where it has
    that name already or the SAE has no place.

    `tied` weights are two matrices there; the scale of `normalization="scalar"` is folded into the weights.

    Raises:
        ValueError: sparsify has no such SAE.
        OSError: the folder cannot be written.
    """
    if config.activation not in ACTIVATIONS:
        raise refuse("activation", config.activation, FORM, f"it has {' and '.join(ACTIVATIONS)}")
    if config.normalization not in ("none", "scalar"):
        raise refuse("normalization", config.normalization, FORM)
    if config.d_out != config.d_in:
        raise refuse("d_out", config.d_out, FORM, f"it would have to be d_in={config.d_in}")
    for name in ("glu", "scaled_selection"):
        if getattr(config, name):
            raise refuse(name, True, FORM)
    weights = without_input_scale(config, tensors, FORM)
    stored = {
        "encoder.weight": weights["W_dec"] if config.tied and "W_enc" not in weights else weights["W_enc"].T,
        "encoder.bias": weights["b_enc"],
        **{name: weights[name] for name in ("W_dec", "b_dec", "W_skip") if name in weights},
    }
    if config.tied:  # safetensors stores no memory twice
        stored["encoder.weight"] = stored["encoder.weight"].detach().clone()
    said = {
        "activation": config.activation,
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": False,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip_connection,
        "transcode": not config.apply_b_dec_to_input,
        "d_in": config.d_in,
    }
    name = folder_of_place(config)
    if name is not None and folder.name != name:
        folder = folder / name
    with locked_folder(folder):
        save_tensors(folder / WEIGHTS, stored)
        write_whole(folder / CONFIG, json.dumps(said, indent=2) + "\n")


FORMAT = Format("sparsify", r"sae\.safetensors", recognise, read, write)
