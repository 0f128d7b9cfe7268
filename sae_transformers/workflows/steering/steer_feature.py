"""Steer with one feature: the same prompt continued with and without, side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...evaluation.steering.side_by_side import check_layer, side_by_side, vector_steering
from ...latents.text_latents import sae_of
from ...modeling import SaeForCausalLM, Steering
from ..results import Result, save_csv
from ..settings.steer_feature import SteerFeatureSettings


@dataclass(frozen=True)
class SteerFeatureResult(Result):
    """Continuations of one prompt from the same random numbers.

    Args:
        prompt: what was continued.
        steered, unsteered: texts without the prompt.
        steering: what the steered ones have: `model.steering = result.steering` keeps it.
        feature, sae: numbers of the feature and of its SAE.
        strength: in the settings' unit.
        settings: how it was done.
    """

    prompt: str
    steered: list[str]
    unsteered: list[str]
    steering: Steering
    feature: int
    sae: int
    strength: float
    settings: SteerFeatureSettings = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """Pairs of a steered and an unsteered text."""
        pairs = zip(self.steered, self.unsteered, strict=True)
        return [{"steered": steered, "unsteered": unsteered} for steered, unsteered in pairs]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        facts = {"prompt": self.prompt, "feature": self.feature, "sae": self.sae, "strength": self.strength}
        settings = dataclasses.asdict(self.settings)
        return {**facts, "steering": self.steering.to_dict(), "continuations": self.rows(), "settings": settings}

    def save(self, path: str | Path) -> None:
        """Write the texts as .csv: steered, unsteered."""
        save_csv(path, self.rows())


def steer_feature(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    feature: int | str,
    strength: float,
    settings: SteerFeatureSettings | None = None,
    *,
    sae: int = 0,
) -> SteerFeatureResult:
    """Continue a prompt with `strength * W_dec[feature]` added to the hidden state, and without.

    Args:
        feature: number of a latent, or the name of a concept or feature.
        strength: 0 changes nothing, negative ones push the other way.
        sae: number of the feature's SAE.

    Raises:
        ValueError: the feature or the layer is not there, or the prompt leaves no room for a continuation.
    """
    settings = settings or SteerFeatureSettings()
    config = sae_of(model, sae).config
    check_layer(config, settings.layer)
    number = config.resolve_feature(feature)
    steering = vector_steering(number, strength, unit=settings.unit, legacy=settings.legacy, sae=sae)
    found = side_by_side(
        model, tokenizer, prompt, steering, settings.generation, frequency_penalty=settings.frequency_penalty
    )
    return SteerFeatureResult(prompt, found.steered, found.unsteered, steering, number, sae, strength, settings)
