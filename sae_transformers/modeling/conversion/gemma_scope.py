"""Gemma Scope: JumpReLU SAEs and transcoders of Gemma 2, `layer_N/width_Wk/average_l0_X/params.npz`.

    pre = x @ W_enc + b_enc ; z = relu(pre) * (pre > threshold) ; output = z @ W_dec + b_dec

"Gemma Scope: open sparse autoencoders everywhere all at once on Gemma 2" (https://huggingface.co/papers/2408.05147),
https://huggingface.co/google/gemma-scope. What an SAE reads is said by the name of its repository alone.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .checkpoint import Checkpoint
from .format import Converted, Format, matrix, no_other_words, only, shaped, takes, whole_name

FILE = "params.npz"
SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_heads"}


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    where = f"{FILE} of {checkpoint.label}"
    for config in ("config.json", "cfg.json"):  # it has none: one that is there may be of another library
        if checkpoint.has(config):
            no_other_words(checkpoint.json(config), (), f"{config} of {checkpoint.label}")
    # Some repositories write w_enc and w_dec.
    tensors = {re.sub("^w_", "W_", name): tensor for name, tensor in checkpoint.tensors(FILE).items()}
    only(tensors, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), where)
    d_in, d_sae = matrix(tensors, "W_enc", where).shape
    d_out = matrix(tensors, "W_dec", where).shape[1]
    for name, shape in {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)}.items():
        shaped(tensors, name, shape, where)
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "activation": "jumprelu"}
    values["apply_b_dec_to_input"] = False
    # Section 4 of the paper: 1,024 tokens, the first of them BOS.
    values["metadata"] = metadata = {"context_length": 1024, "prepend_bos": True}
    converted = Converted(values, tensors)
    name = whole_name(checkpoint)
    repository = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?![a-z])", name)
    if repository:
        metadata["base_model"] = f"google/gemma-2-{repository[1]}" + ("-it" if repository[2] == "it" else "")
    layer = re.search(r"(?:^|/)layer_(\d+)(?:/|$)", name)
    if re.search(r"(?:^|/)embedding/width_", name):
        # Weights are in units of the rows of the embedding matrix; the stream of Gemma has them times sqrt(d).
        values.update(layer=0, site="resid_pre", normalization="scalar", input_scale=1 / math.sqrt(d_in))
    elif layer and repository and repository[3] in SITES:
        values.update(layer=int(layer[1]), site=SITES[repository[3]])
    elif layer and repository:
        metadata["original_hook"] = f"blocks.{layer[1]}.ln2.hook_normalized"
        converted.warnings.append(
            f"this transcoder reads the norm of layer {layer[1]}'s MLP before the norm's weight, which no module "
            f"returns, and writes the MLP's output; it has no place until `layer` and `site` or `hook` give it one."
        )
    return converted


FORMAT = Format("Gemma Scope", r"params\.npz", lambda checkpoint: checkpoint.has(FILE), read)
