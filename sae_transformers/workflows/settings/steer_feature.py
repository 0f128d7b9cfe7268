"""Settings of `steer_feature`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...evaluation.settings import GenerationSettings
from ...latents.settings import check_choice, check_integers

UNITS = ("absolute", "norm", "max")


@dataclass(frozen=True)
class SteerFeatureSettings:
    """How one feature is steered, and how the prompt is continued.

    Args:
        unit: unit of the strength: `absolute`, times the decoder row; `norm`, in lengths of the hidden state; `max`,
            in largest activations of the feature.
        layer: layer to steer at; it must be the SAE's own.
        legacy: as the original: all tokens of the prompt but the last, no others.
        frequency_penalty: taken off a token's logit for each of its occurrences.
        generation: how the prompt is continued; as many samples with steering as without.
    """

    unit: str = "absolute"
    layer: int | None = None
    legacy: bool = False
    frequency_penalty: float = 0.0
    generation: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(max_new_tokens=50, temperature=1.0, samples_per_prompt=3)
    )

    def __post_init__(self) -> None:
        check_choice(self, "unit", UNITS)
        check_integers(self, layer=0)
        if self.legacy and self.unit != "absolute":
            raise ValueError(
                f"`legacy` adds the decoder row as it is and needs `unit` absolute. Received: unit={self.unit!r}."
            )
