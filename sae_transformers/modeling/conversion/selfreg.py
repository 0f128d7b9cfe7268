"""SAEs of SelfReg for Mistral-7B-Instruct-v0.2: `TopK7_l16_h65k_epoch5.pth`.

    h = (x - b_dec) @ W_enc + b_enc ; z = relu(the k largest of h) ; output = z @ W_enc.T + b_dec

"Self-regularization with sparse autoencoders for controllable LLM-based classification"
(https://huggingface.co/papers/2502.14133),
https://github.com/JacksonWuxs/SelfReg-Achieving_Controllable_LLM_Classifier_with_SAE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .checkpoint import Checkpoint
from .format import (
    Converted,
    Format,
    agree,
    matrix,
    no_other_words,
    number,
    one_pickle,
    only,
    shaped,
    takes,
    whole_name,
)

NAMES = ("W_enc", "b_enc", "b_dec")
BASE = "mistralai/Mistral-7B-Instruct-v0.2"


def _parts(checkpoint: Checkpoint, file: str) -> tuple[Any, Any]:
    """Tensors and config; a bare state dict has no config."""
    found = checkpoint.pickled(file)
    return (found.get("weight"), found.get("config")) if set(found) == {"weight", "config"} else (found, {})


def recognise(checkpoint: Checkpoint) -> bool:
    file = one_pickle(checkpoint)
    if file is None:
        return False
    weight, config = _parts(checkpoint, file)
    if not isinstance(weight, Mapping) or not isinstance(config, Mapping):
        return False
    return "linear1.weight" in weight or (set(NAMES) <= set(weight) <= {*NAMES, "mask"})


def read(checkpoint: Checkpoint) -> Converted:
    file, where = checkpoint.files[0], checkpoint.label
    weight, config = _parts(checkpoint, file)
    if "linear1.weight" in weight:
        inside = ", with a copy of its SAE under `sae.`" if any(str(key).startswith("sae.") for key in weight) else ""
        raise ValueError(
            f"{where} is a SelfReg classifier{inside}, not an SAE. Name the file of the SAE, as "
            f"`TopK7_l16_h65k_epoch5.pth`; `selfreg_classifier` opens the classifier."
        )
    only(weight, (*NAMES, "mask"), where)
    if strange := [name for name, value in weight.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{', '.join(strange)} in {where} must be tensors.")
    d_in, d_sae = matrix(weight, "W_enc", where).shape
    no_other_words(config, (), where)
    agree(config, {"d_inp": d_in, "d_hide": d_sae}, where)
    tensors = {
        "W_dec": weight["W_enc"].T,
        "b_enc": shaped(weight, "b_enc", (d_sae,), where),
        "b_dec": shaped(weight, "b_dec", (d_in,), where),
    }
    if "topK" in config:
        takes(checkpoint)
        k = number(config, "topK", where, kind=int)
    elif "k" in checkpoint.given:
        takes(checkpoint, "k")
        k = number(checkpoint.given, "k", where, kind=int)
    else:
        raise ValueError(
            f"{where} does not say how many latents are kept for each token. Pass `k=`; the paper has 20."
        )
    values: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "activation": "topk", "k": k, "tied": True}
    metadata: dict[str, Any] = {"base_model": BASE}
    values["metadata"] = metadata
    if "mask" in weight:
        mask = shaped(weight, "mask", (d_sae,), where)
        # All ones, as a new SAE has it, marks nothing. No part of encoding or decoding uses it.
        if not bool((mask == 1).all()):
            metadata["mask"] = mask.nonzero().flatten().tolist()
    layer = re.search(r"_l(\d+)(?=[_.]|$)", file) or re.search(r"SAE_l(\d+)(?!\d)", whole_name(checkpoint))
    if layer and int(layer[1]):
        # The original counts blocks from 1.
        values.update(layer=int(layer[1]) - 1, site="resid_post")
    return Converted(values, tensors)


class ClassifierWeights(NamedTuple):
    """A trained classifier's linear layer: weight (n_labels, d_in), bias (n_labels,). sae: the parameters of the SAE
    whose features it was kept off, by name; none for a baseline."""

    weight: Tensor
    bias: Tensor
    sae: dict[str, Tensor]


def read_classifier(path: str | os.PathLike[str]) -> ClassifierWeights:
    """What a file such as `SelfReg/seed0.pt` holds; pickles are read by torch's tensor-only unpickler.

    Raises:
        ValueError: it is no such file, or its tensors do not fit one another.
        OSError: it is not there.
    """
    checkpoint = Checkpoint(os.fspath(path))
    where = checkpoint.label
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a classifier's file, such as SelfReg/seed0.pt. Received: {where!r}.")
    weight, config = _parts(checkpoint, Path(path).name)
    if not isinstance(weight, Mapping) or "linear1.weight" not in weight:
        raise ValueError(f"A SelfReg classifier has `linear1.weight`. Received: {where}, which has none.")
    linear = matrix(weight, "linear1.weight", where)
    n_labels, d_in = linear.shape
    agree(config, {"in_dim": d_in}, where)
    copied = {str(name).removeprefix("sae."): value for name, value in weight.items() if str(name).startswith("sae.")}
    only(weight, ("linear1.weight", "linear1.bias", *(f"sae.{name}" for name in (*NAMES, "mask"))), where)
    return ClassifierWeights(linear, shaped(weight, "linear1.bias", (n_labels,), where), copied)


FORMAT = Format("SelfReg", r"TopK\d+_l\d+_[^/]*\.pth", recognise, read, one_file=True)
