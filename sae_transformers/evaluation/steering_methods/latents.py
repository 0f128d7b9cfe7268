"""Single latents, over strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .method import STRENGTHS, MethodInputs, MethodMaker, PreparedMethods

if TYPE_CHECKING:
    from ...modeling import SaeForCausalLM

IN_NORMS = ("direction", "set", "at_least", "at_most", "add")  # other operations take a value as it is


@dataclass(frozen=True)
class Latents(MethodMaker):
    """Latents or concepts, each a method `latent NAME`; the first is what DiffMean is compared with.

    Args:
        features: SAE, and latent or name of a concept; None for the concepts of the SAEs.
        strengths: values of the edit, negative ones for less of the concept; for op `scale`, factors.
        op: see `FeatureEdit`.
        positions: of `Steering`.
        first, last: which of the features are meant, as of a slice, so that others can come after other methods.
    """

    features: Sequence[tuple[int, int | str]] | None = None
    strengths: Sequence[float] = STRENGTHS
    op: str = "direction"
    positions: Any = "all"
    first: int = 0
    last: int | None = None

    @classmethod
    def read(cls, options: Any, inputs: MethodInputs) -> Latents | None:
        """The first feature; the others are `OtherLatents`."""
        return cls(inputs.features, inputs.strengths, inputs.op, last=1)

    def prepare(self, made: PreparedMethods) -> None:
        """A method for each feature."""
        from .over_strengths import latent_method

        for sae, feature in self._chosen(made.model):
            number = made.model.config.sae_configs[sae].resolve_feature(feature)
            unit = "norm" if self.op in IN_NORMS else "absolute"
            several = bool(made.first and sae)
            method = latent_method(feature, self.strengths, sae=sae, op=self.op, unit=unit, positions=self.positions)
            made.methods[f"latent {feature}" + (f" of SAE {sae}" if several else "")] = method
            made.first = made.first or (sae, number)

    def count(self, model: SaeForCausalLM) -> int:
        """A setting for each strength of each feature."""
        return len(self._chosen(model)) * len(self.strengths)

    def _chosen(self, model: SaeForCausalLM) -> list[tuple[int, int | str]]:
        features = self.features
        if features is None:
            features = [(i, name) for i, entry in enumerate(model.config.sae_configs) for name in entry.concepts]
        return list(features)[self.first : self.last]


@dataclass(frozen=True)
class OtherLatents(Latents):
    """Features after the first, which are measured last."""

    @classmethod
    def read(cls, options: Any, inputs: MethodInputs) -> OtherLatents | None:
        """All features but the first."""
        return cls(inputs.features, inputs.strengths, inputs.op, first=1)
