"""SAEs that are one torch file of an encoder and a decoder with ReLU between them, known by the names of their files.

    Goodfire    z = relu(x @ encoder_linear.weight.T + encoder_linear.bias), output = the same by decoder_linear
    DeepSeek-R1 z = relu(x @ encoder.weight.T + encoder.bias), output = the same by decoder
    Kissane     z = relu((x - b_dec) @ W_enc + b_enc), output = z @ W_dec + b_dec

Goodfire's for Llama 3 (https://huggingface.co/Goodfire) and qresearch's
(https://huggingface.co/qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19) read the output of a block; those of Kissane et
al. (https://huggingface.co/ckkissane/attn-saes-gpt2-small-all-layers) read what the heads put out, side by side,
before the output projection. State dicts of two linear maps are common: elsewhere than Goodfire's, whose keys are
their own, the file is known by its name as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .format import Converted, Format, agree, matrix, no_other_words, one_pickle, only, shaped, takes, whole_name

GOODFIRE = r"Llama-[^/]*-SAE-l(\d+)\.pth?"
DEEPSEEK = r"(DeepSeek-R1-Distill-[^/]+?)-SAE-l(\d+)\.pt"
KISSANE = r"gpt2-small_L(\d+)_Hcat_z_[^/]*\.pt"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def _holds(checkpoint: Checkpoint, names: set[str], file_name: str = ".*") -> bool:
    file = one_pickle(checkpoint)
    return file is not None and re.fullmatch(file_name, file) is not None and names <= checkpoint.names(file)


def _linear(found: Mapping[str, Any], encoder: str, decoder: str, where: str) -> dict[str, Tensor]:
    """Tensors of two `nn.Linear`."""
    only(found, tuple(f"{part}.{kind}" for part in (encoder, decoder) for kind in ("weight", "bias")), where)
    d_sae, d_in = matrix(found, f"{encoder}.weight", where).shape
    return {
        "W_enc": found[f"{encoder}.weight"].T,
        "W_dec": shaped(found, f"{decoder}.weight", (d_in, d_sae), where).T,
        "b_enc": shaped(found, f"{encoder}.bias", (d_sae,), where),
        "b_dec": shaped(found, f"{decoder}.bias", (d_in,), where),
    }


def _converted(tensors: dict[str, Tensor], place: dict[str, Any], base: str | None, subtracts: bool) -> Converted:
    d_in, d_sae = tensors["W_enc"].shape
    values = {"d_in": d_in, "d_sae": d_sae, "activation": "relu", "apply_b_dec_to_input": subtracts, **place}
    return Converted({**values, "metadata": {"base_model": base} if base else {}}, tensors)


def _read_goodfire(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    file, where = checkpoint.files[0], checkpoint.label
    tensors = _linear(checkpoint.pickled(file), "encoder_linear", "decoder_linear", where)
    base = re.search(r"Llama-3\.\d-\d+B-Instruct", f"{whole_name(checkpoint)}/{file}")
    layer = re.search(r"-l(\d+)\.pth?$", file)
    place = {"layer": int(layer[1]), "site": "resid_post"} if layer else {}
    return _converted(tensors, place, f"meta-llama/{base[0]}" if base else None, subtracts=False)


def _read_deepseek(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    file = checkpoint.files[0]
    tensors = _linear(checkpoint.pickled(file), "encoder", "decoder", checkpoint.label)
    base, layer = re.findall(DEEPSEEK, file)[0]
    return _converted(tensors, {"layer": int(layer), "site": "resid_post"}, f"deepseek-ai/{base}", subtracts=False)


def _read_kissane(checkpoint: Checkpoint) -> Converted:
    takes(checkpoint)
    file, where = checkpoint.files[0], checkpoint.label
    found = checkpoint.pickled(file)
    only(found, NAMES, where)
    d_in, d_sae = matrix(found, "W_enc", where).shape
    beside, config = checkpoint.within(checkpoint.folder), f"{file.removesuffix('.pt')}_cfg.json"
    if beside.has(config):
        said = beside.json(config)
        no_other_words(said, (), f"{beside.label}/{config}")
        agree(said, {"act_size": d_in, "dict_size": d_sae}, f"{beside.label}/{config}")
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    tensors = {name: shaped(found, name, shape, where) for name, shape in shapes.items()}
    place = {"layer": int(re.findall(KISSANE, file)[0]), "site": "attn_heads"}
    return _converted(tensors, place, "openai-community/gpt2", subtracts=True)


FORMATS = (
    Format(
        "Goodfire",
        GOODFIRE,
        lambda checkpoint: _holds(checkpoint, {"encoder_linear.weight", "decoder_linear.weight"}),
        _read_goodfire,
        one_file=True,
    ),
    Format(
        "DeepSeek-R1 (qresearch)",
        DEEPSEEK,
        lambda checkpoint: _holds(
            checkpoint, {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}, DEEPSEEK
        ),
        _read_deepseek,
        one_file=True,
    ),
    Format(
        "Kissane (attention)",
        KISSANE,
        lambda checkpoint: _holds(checkpoint, set(NAMES), KISSANE),
        _read_kissane,
        one_file=True,
    ),
)
