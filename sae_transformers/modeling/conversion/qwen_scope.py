"""Qwen Scope: one file for each layer, `layer{n}.sae.pt`; `k` is in the name of the repository, `...-L0_50`.

    z = the k largest of x @ W_enc.T + b_enc, others 0 ; output = z @ W_dec.T + b_dec

Model cards of https://huggingface.co/Qwen. There is no relu after the selection: a negative value among the k largest
stays (SAELens has a relu there). Both matrices are stored transposed, W_enc (d_sae, d_in) and W_dec (d_in, d_sae).
"""

from __future__ import annotations

import re
from typing import Any

from .checkpoint import Checkpoint
from .format import Converted, Format, matrix, number, one_pickle, only, shaped, takes, whole_name

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
FILE = r"layer(\d+)\.sae\.pt"


def recognise(checkpoint: Checkpoint) -> bool:
    file = one_pickle(checkpoint)
    return file is not None and re.fullmatch(FILE, file) is not None and set(NAMES) <= checkpoint.names(file)


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint, "k")
    file, where = checkpoint.files[0], checkpoint.label
    found = checkpoint.pickled(file)
    only(found, NAMES, where)
    d_sae, d_in = matrix(found, "W_enc", where).shape
    tensors = {
        "W_enc": found["W_enc"].T,
        "W_dec": shaped(found, "W_dec", (d_in, d_sae), where).T,
        "b_enc": shaped(found, "b_enc", (d_sae,), where),
        "b_dec": shaped(found, "b_dec", (d_in,), where),
    }
    name = whole_name(checkpoint)
    stated = re.findall(r"L0_(\d+)(?!\d)", name)
    if "k" not in checkpoint.given and not stated:
        raise ValueError(
            f"{where} does not say how many latents are kept for each token: the name of its repository does, as in "
            f"`Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`. Pass `k=`, or give the folder that name."
        )
    k = number({"k": int(stated[-1])} if stated else {}, "k", where, kind=int, default=None)
    k = number(checkpoint.given, "k", where, kind=int, default=k)
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "activation": "topk-identity", "k": k}
    values["apply_b_dec_to_input"] = False
    base = re.search(r"SAE-Res-(Qwen[^/]+?)-W\d+K-L0_", name)
    values["metadata"] = {"base_model": f"Qwen/{base[1]}"} if base else {}
    if layer := re.fullmatch(FILE, file):
        values.update(layer=int(layer[1]), site="resid_post")
    return Converted(values, tensors)


FORMAT = Format("Qwen Scope", FILE, recognise, read, one_file=True)
