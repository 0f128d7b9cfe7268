"""Control vectors of llama.cpp and repeng as steering."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel

from ....modeling import FeatureEdit, SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig, Steering
from .gguf_files import read_control_vector


class LoadedControlVector(NamedTuple):
    """model: with an SAE of one direction for each block that is steered, behind its own SAEs. steering: adds them.
    model_hint: the model type that the file was made for."""

    model: SaeForCausalLM
    steering: Steering
    model_hint: str


def load_control_vector(
    file: str | os.PathLike[str],
    model: PreTrainedModel | SaeForCausalLM | str | os.PathLike[str],
    strength: float = 1.0,
    **base_options: Any,
) -> LoadedControlVector:
    """Read a control vector (.gguf) into a model that can be steered with it.

    Each vector is the decoder row of an SAE of its own at `resid_post` of its block, as it is in the file, so that
    exporting the steering gives the file's numbers back, bit for bit.

    Args:
        file: as llama.cpp's `--control-vector` takes it.
        model: a base, or its name; or an `SaeForCausalLM`, whose SAEs keep their numbers and whose base is used.
        strength: factor of all vectors, as of `--control-vector-scaled`.
        base_options: for a base by name: what `from_pretrained` takes.

    Raises:
        ValueError: the file is damaged or of another kind, or made for a model of another width or depth.
        OSError: a file or model is not there.
    """
    stored = read_control_vector(file)
    base: Any = getattr(model, "lm", model)
    own: list[SparseAutoencoder] = list(getattr(model, "saes", ()))
    if isinstance(base, (str, os.PathLike)):
        base = SaeForCausalLM.from_base(os.fspath(base), **base_options).lm
    elif base_options:
        raise TypeError(f"Options {sorted(base_options)} load a base by name. Received: a loaded model.")
    config = base.config.get_text_config()
    width, depth = config.hidden_size, config.num_hidden_layers
    for layer, vector in stored.directions.items():
        if len(vector) != width or layer >= depth:
            raise ValueError(
                f"{os.fspath(file)} was made for another model: expected directions of {width} numbers for blocks 1 "
                f"to {depth - 1} of this {config.model_type}. Received: direction.{layer} of {len(vector)}, made for "
                f"{stored.model_hint!r}."
            )
    steered = {layer: vector for layer, vector in stored.directions.items() if bool(vector.any())}
    if not steered:
        raise ValueError(f"{os.fspath(file)} changes nothing. Expected a direction that is not zero.")
    saes = []
    for layer, vector in steered.items():
        sae_config = SparseAutoencoderConfig(
            d_in=width, d_sae=1, activation="relu", apply_b_dec_to_input=False, layer=layer, site="resid_post"
        )
        sae = SparseAutoencoder(sae_config)
        with torch.no_grad():
            sae.W_dec.copy_(vector)
            sae.W_enc.copy_(vector[:, None] / vector.norm())  # reads the state along the direction
            sae.b_enc.zero_()
            sae.b_dec.zero_()
        saes.append(sae)
    edits = [FeatureEdit(len(own) + i, 0, "direction", strength) for i in range(len(saes))]
    whole = SaeForCausalLM.from_base(base, saes=[*own, *saes])
    return LoadedControlVector(whole, Steering(edits), stored.model_hint)
