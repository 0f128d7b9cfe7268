"""A steering as a file or a model that other programs run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ....modeling import SaeForCausalLM, Steering
from ...loading import load, read_steering
from .baked_bias import bake
from .constant_vectors import constant_vectors
from .gguf_files import write_control_vector

TARGETS = ("gguf", "baked_bias")


@dataclass(frozen=True)
class SteeringExport:
    """What was written.

    Args:
        to: `gguf` or `baked_bias`.
        path: the file or folder.
        norms: index of the block, from 0 -> norm of the vector that is added to what it returns.
        difference: of a baked bias: largest difference of its logits to the steered model's on random tokens,
            relative to the largest logit.
    """

    to: str
    path: str
    norms: dict[int, float]
    difference: float | None = None

    def summary(self) -> list[str]:
        """What was written, in a line, and how it is used."""
        added = ", ".join(f"{norm:.3g} behind block {layer}" for layer, norm in self.norms.items())
        if self.to == "gguf":
            return [f"{self.path}: a control vector of norm {added}.", f"llama-cli --control-vector {self.path}"]
        equal = "" if self.difference is None else f"; its logits differ by {self.difference:.1e} from the steered"
        return [
            f"{self.path}: a model with biases of norm {added}{equal}.",
            f"AutoModelForCausalLM.from_pretrained({self.path!r})",
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def export_steering(
    model: SaeForCausalLM,
    steering: Steering | dict[str, Any] | str | None,
    out: str | os.PathLike[str],
    to: str = "gguf",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SteeringExport:
    """Write a steering for programs that do not know SAEs.

    What can be said is a constant vector added at every token: edits of op `direction` (or `add`) at `resid_post`, in
    absolute values or multiples of the maximum; all else is refused with the field that is in the way.

    Args:
        model: an `SaeForCausalLM`.
        steering: as `generate` takes it; None for the model's own.
        out: a file for `gguf`, a new or empty folder for `baked_bias`.
        to: `gguf`: a control vector for llama.cpp, Ollama's engine, and repeng; not behind block 0. `baked_bias`: the
            base as a checkpoint of transformers, with the vectors in the biases of its MLPs, where the family has
            them (GPT-2, GPT-NeoX, OPT, Phi) or its config a switch (`mlp_bias`: Llama, Granite).
        tokenizer: written beside a baked bias.

    Raises:
        ValueError: the steering or the family cannot be said so.
        ImportError: the package gguf is not installed.
        OSError: nothing can be written there.
    """
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {', '.join(TARGETS)}. Received: to={to!r}.")
    if not hasattr(model, "saes"):
        raise TypeError(f"Expected an SaeForCausalLM, whose SAEs are steered along. Received: {type(model).__name__}.")
    wanted = Steering.coerce(model.steering if steering is None else steering)
    vectors = constant_vectors(model, wanted)
    norms = {layer: float(vector.norm()) for layer, vector in vectors.items()}
    path = os.fspath(out)
    if to == "gguf":
        write_control_vector(path, vectors, model.config.get_text_config().model_type)
        return SteeringExport(to, path, norms)
    return SteeringExport(to, path, norms, bake(model, wanted, vectors, Path(path), tokenizer))


def export_by_name(
    model: str,
    saes: Sequence[str],
    steering: str,
    out: str | os.PathLike[str],
    to: str,
    hook_point: str | None = None,
) -> SteeringExport:
    """`export_steering` of a model by name and a steering as JSON or a file of it; see `load` and `read_steering`."""
    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {', '.join(TARGETS)}. Received: to={to!r}.")
    loaded, tokenizer, _ = load(model, list(saes) or None, hook_point=hook_point)
    return export_steering(loaded, read_steering(steering, model), out, to, tokenizer=tokenizer)
