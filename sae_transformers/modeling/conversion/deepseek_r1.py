"""The SAE of qresearch for DeepSeek-R1-Distill-Llama-8B: `DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`.

    z = relu(x @ encoder.weight.T + encoder.bias) ; output = z @ decoder.weight.T + decoder.bias

https://huggingface.co/qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19. Read from the output of block 19. Keys of this
kind are common: the file is known by its name as well.
"""

from __future__ import annotations

import re
from typing import Any

from .checkpoint import Checkpoint
from .format import Converted, Format, matrix, one_pickle, only, shaped, takes

NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
FILE = r"(DeepSeek-R1-Distill-[^/]+?)-SAE-l(\d+)\.pt"


def recognise(checkpoint: Checkpoint) -> bool:
    file = one_pickle(checkpoint)
    return file is not None and re.fullmatch(FILE, file) is not None and set(NAMES) <= checkpoint.names(file)


def read(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    file, where = checkpoint.files[0], checkpoint.label
    found = checkpoint.pickled(file)
    only(found, NAMES, where)
    d_sae, d_in = matrix(found, "encoder.weight", where).shape
    tensors = {
        "W_enc": found["encoder.weight"].T,
        "W_dec": shaped(found, "decoder.weight", (d_in, d_sae), where).T,
        "b_enc": shaped(found, "encoder.bias", (d_sae,), where),
        "b_dec": shaped(found, "decoder.bias", (d_in,), where),
    }
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "activation": "relu", "apply_b_dec_to_input": False}
    if match := re.fullmatch(FILE, file):
        values.update(layer=int(match[2]), site="resid_post", metadata={"base_model": f"deepseek-ai/{match[1]}"})
    return Converted(values, tensors)


FORMAT = Format("DeepSeek-R1 (qresearch)", FILE, recognise, read, one_file=True)
