"""What the models return. Every field states its shape."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils.generic import ModelOutput


class SparseFeatures(NamedTuple):
    """The active latents of every token, without the zeros.

    indices: (..., width) int64, latents of the token: in descending order of value for top-k activations, ascending
        index for the others. Where fewer than `width` are active the rest have value 0.
    values: (..., width), activation of each, dtype of the SAE. `width` is k for top-k activations, otherwise the
        largest number of active latents in the batch.
    d_sae: number of latents.
    """

    indices: torch.Tensor
    values: torch.Tensor
    d_sae: int

    def __repr__(self) -> str:
        shape = (*self.values.shape[:-1], self.d_sae)
        nnz = "?" if self.values.is_meta else int((self.values != 0).sum())
        dtype = str(self.values.dtype).removeprefix("torch.")
        return f"SparseFeatures(shape={shape}, nnz={nnz}, width={self.values.shape[-1]}, dtype={dtype})"

    def to_dense(self) -> torch.Tensor:
        """The same as one tensor, (..., d_sae)."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return dense.scatter_add(-1, self.indices, self.values)  # padding repeats index 0 with value 0

    @classmethod
    def from_dense(cls, latents: torch.Tensor) -> SparseFeatures:
        """The non-zeros of (..., d_sae) latents, without sorting them."""
        rows = latents.reshape(-1, latents.shape[-1])
        row, column = rows.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(rows))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        width = max(1, int(counts.max())) if len(rows) else 1
        indices = column.new_zeros(len(rows), width).index_put((row, place), column)
        values = rows.new_zeros(len(rows), width).index_put((row, place), rows[row, column])
        shape = (*latents.shape[:-1], width)
        return cls(indices.view(shape), values.view(shape), latents.shape[-1])

    def column(self, feature: int) -> torch.Tensor:
        """Activation of one latent at every token, (...)."""
        return (self.values * (self.indices == feature)).sum(-1)


class Detection(NamedTuple):
    """How strongly one feature answers.

    per_token: (batch, seq), float; 0 at tokens that do not count.
    per_text: (batch,), float, pooled over the tokens that count; NaN where there is none.
    """

    per_token: torch.Tensor
    per_text: torch.Tensor


class TopFeatures(NamedTuple):
    """The strongest features of each token.

    features: (batch, seq, k) int64, by magnitude of their activation, descending; -1 where fewer are active.
    values: (batch, seq, k), activations; 0 where fewer are active.
    counted: (batch, seq) bool: the tokens that were read; the others have no features.
    """

    features: torch.Tensor
    values: torch.Tensor
    counted: torch.Tensor


@dataclass
class SparseAutoencoderOutput(ModelOutput):
    """
    reconstruction: (..., d_out), in the units of the input.
    latents: (..., d_sae).
    """

    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class SaeOutputFields:
    """The fields that every head adds, one entry of each tuple for each SAE (None for one that was not asked).

    sae_features: `SparseFeatures` of (batch, seq, width), or (batch, seq, m) with `features=[...]`.
    sae_inputs: (batch, seq, d_in), the hidden states that the SAE reads, with `output_sae_inputs=True`.
    sae_losses: name -> (), unweighted, averaged over SAEs.
    lm_loss: (), the base's own loss, unweighted.
    """

    sae_features: tuple[SparseFeatures | torch.Tensor | None, ...] | None = None
    sae_inputs: tuple[torch.Tensor | None, ...] | None = None
    sae_losses: dict[str, torch.Tensor] | None = None
    lm_loss: torch.Tensor | None = None


@dataclass
class SaeModelOutput(SaeOutputFields, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and `SaeOutputFields`."""


@dataclass
class SaeCausalLMOutput(SaeOutputFields, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and `SaeOutputFields`; `logits` is None with `stop_at_last_sae=True`."""


@dataclass
class SaeSequenceClassifierOutput(SaeOutputFields, SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast` and `SaeOutputFields`.

    pooled_states: (batch, d_in), what a feature head scores.
    """

    pooled_states: torch.Tensor | None = None


OUTPUT_CLASSES: dict[type, type] = {
    BaseModelOutputWithPast: SaeModelOutput,
    CausalLMOutputWithPast: SaeCausalLMOutput,
    SequenceClassifierOutputWithPast: SaeSequenceClassifierOutput,
}


def output_class(base: type, default: type) -> type:
    """The class of a base's outputs with ours added, `default` where the base returned no `ModelOutput`. Families with
    fields of their own (routers' logits, a recurrent state, image states) keep them."""
    found = OUTPUT_CLASSES.get(base)
    if found is not None:
        return found
    if not issubclass(base, ModelOutput):
        return default
    if base.__name__.startswith("Sae") and hasattr(base, "sae_features"):
        return base
    made = type(
        f"Sae{base.__name__}",
        (SaeOutputFields, base),
        {"__doc__": f"`{base.__name__}` and `SaeOutputFields`.", "__module__": __name__, "__reduce__": _reduce},
    )
    return OUTPUT_CLASSES.setdefault(base, dataclass(made))


def make_output_classes(base: object) -> None:
    """Make the classes of all outputs that are known where a base's class is defined; `torch.compile` could not."""
    module = sys.modules.get(type(base).__module__)
    for value in list(vars(module).values()) if module else ():
        if isinstance(value, type) and issubclass(value, ModelOutput) and value is not ModelOutput:
            output_class(value, value)


def _reduce(output: Any) -> tuple:
    base = next(cls for cls in type(output).__mro__[1:] if issubclass(cls, ModelOutput))
    return _rebuilt, (base, dict(output.items()))


def _rebuilt(base: type, values: dict[str, Any]) -> Any:
    return output_class(base, base)(**values)
