"""A steering as a whole, such as the model's default, scaled by factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .method import MethodInputs, MethodMaker, PreparedMethods

if TYPE_CHECKING:
    from ...modeling import SaeForCausalLM, Steering

FACTORS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class ScaledSteering(MethodMaker):
    """Method `steering`: all edits of a steering, scaled together.

    Args:
        steering: by default the model's own; without any, there is no such method.
        factors: 1 is the steering itself, and -1 goes the other way.
    """

    steering: Steering | None = None
    factors: Sequence[float] = FACTORS

    @classmethod
    def read(cls, options: Any, inputs: MethodInputs) -> ScaledSteering:
        """The model's default steering."""
        return cls()

    def prepare(self, made: PreparedMethods) -> None:
        """The steering at every factor."""
        from .over_strengths import scaled_method

        if steering := self.steering or made.model.steering:
            made.methods["steering"] = scaled_method(steering, self.factors)

    def count(self, model: SaeForCausalLM) -> int:
        """A setting for each factor, where there is a steering."""
        return len(self.factors) if self.steering or model.steering else 0
