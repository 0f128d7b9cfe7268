"""SAEs of Goodfire for Llama 3: `Llama-3.1-8B-Instruct-SAE-l19.pth`, `Llama-3.3-70B-Instruct-SAE-l50.pt`.

    z = relu(x @ encoder_linear.weight.T + encoder_linear.bias) ; output = z @ decoder_linear.weight.T + bias

https://huggingface.co/Goodfire. Read from the output of a block.
"""

from __future__ import annotations

import re
from typing import Any

from .checkpoint import Checkpoint
from .format import Converted, Format, matrix, one_pickle, only, shaped, takes, whole_name

NAMES = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


def recognise(checkpoint: Checkpoint) -> bool:
    file = one_pickle(checkpoint)
    return file is not None and {"encoder_linear.weight", "decoder_linear.weight"} <= checkpoint.names(file)


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    file, where = checkpoint.files[0], checkpoint.label
    found = checkpoint.pickled(file)
    only(found, NAMES, where)
    d_sae, d_in = matrix(found, "encoder_linear.weight", where).shape
    tensors = {
        "W_enc": found["encoder_linear.weight"].T,
        "W_dec": shaped(found, "decoder_linear.weight", (d_in, d_sae), where).T,
        "b_enc": shaped(found, "encoder_linear.bias", (d_sae,), where),
        "b_dec": shaped(found, "decoder_linear.bias", (d_in,), where),
    }
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "activation": "relu", "apply_b_dec_to_input": False}
    base = re.search(r"Llama-3\.\d-\d+B-Instruct", f"{whole_name(checkpoint)}/{file}")
    values["metadata"] = {"base_model": f"meta-llama/{base[0]}"} if base else {}
    if layer := re.search(r"-l(\d+)\.pth?$", file):
        values.update(layer=int(layer[1]), site="resid_post")
    return Converted(values, tensors)


FORMAT = Format("Goodfire", r"Llama-[^/]*-SAE-l\d+\.pth?", recognise, read, one_file=True)
