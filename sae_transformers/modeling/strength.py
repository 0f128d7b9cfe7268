"""How far an edit goes at each token: by what a detector says there, and by how much has been generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .checked_values import check_feature, check_sae_number, finite_number, from_mapping

DECAYS = ("linear", "exponential")
STRENGTH_UNITS = ("absolute", "max")
WITHOUT_STRENGTH = ("erase", "scale_magnitude")  # ops that are done or not


@dataclass(frozen=True)
class Strength:
    """A factor f of an edit at each token: a latent z becomes `z + f * (op(z) - z)`, and a `direction` is added f
    times. 1 is the whole edit, 0 none: such a token is what it was, bit for bit.

        f = (least + (most - least) * min(max((s - low) / (high - low), 0), 1)) * schedule(g)

    s is the detector's value at the token; without a detector the first factor is 1. g counts generated tokens: 0 up
    to the last token of the prompt, whose output is the first new one, then 1, 2, ... `schedule` is 1 without `first`
    and `decay`; 0 from g = `first` on; `1 - g / over`, at least 0, for `linear`; `2 ** (-g / over)` for `exponential`.

    Args:
        feature: index of the detector's latent, or its name; of an SAE of directions (`direction_sae`) a direction.
        sae: number of its SAE, which must run before the edit, or be the edit's.
        low, high: values of s with the factors `least` and `most`, low < high.
        unit: of `low` and `high`: `absolute` activation, or `max`, multiples of the latent's typical maximum.
        least, most: bounds of the detector's factor.
        pre_activations: s is the pre-activation (of a gated SAE the gate's).
        first: only the first so many new tokens are chosen under the edit.
        decay: `linear` or `exponential`.
        over: new tokens until nothing is left (`linear`), or in which half of it goes (`exponential`).

    Raises:
        ValueError: a number that is none, bounds the wrong way round, or nothing that a strength could follow.
    """

    feature: int | str | None = None
    sae: int = 0
    low: float = 0.0
    high: float | None = None
    unit: str = "absolute"
    least: float = 0.0
    most: float = 1.0
    pre_activations: bool = False
    first: int | None = None
    decay: str | None = None
    over: float | None = None

    def __post_init__(self) -> None:
        if self.feature is None and self.first is None and self.decay is None:
            raise ValueError("A strength follows a `feature`, `first` or `decay`. Received: none of these.")
        if not isinstance(self.pre_activations, bool):
            raise TypeError(
                f"`pre_activations` must be True or False. Received: pre_activations={self.pre_activations!r}."
            )
        if self.feature is None:
            self._check_no_detector()
        else:
            self._check_detector()
        if self.first is not None and (
            isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 1
        ):
            raise ValueError(f"`first` must be a number of tokens, from 1. Received: first={self.first!r}.")
        if self.decay is not None and self.decay not in DECAYS:
            raise ValueError(f"`decay` must be one of {', '.join(map(repr, DECAYS))}. Received: decay={self.decay!r}.")
        if (self.decay is None) != (self.over is None):
            raise ValueError(f"`decay` and `over` go together. Received: decay={self.decay!r}, over={self.over!r}.")
        if self.over is not None:
            object.__setattr__(self, "over", finite_number("over", self.over))
            if self.over <= 0:
                raise ValueError(f"`over` must be more than 0 tokens. Received: over={self.over!r}.")

    def _check_no_detector(self) -> None:
        given = [f.name for f in fields(self)[1:8] if getattr(self, f.name) != f.default]
        if given:
            raise ValueError(f"`{given[0]}` is of a detector. Expected `feature` beside it. Received: none.")

    def _check_detector(self) -> None:
        check_sae_number(self.sae)
        check_feature(self.feature)
        if self.unit not in STRENGTH_UNITS:
            known_units = ", ".join(map(repr, STRENGTH_UNITS))
            raise ValueError(f"`unit` must be one of {known_units}. Received: unit={self.unit!r}.")
        for name in ("low", "high", "least", "most"):
            object.__setattr__(self, name, finite_number(name, getattr(self, name)))
        if self.high is None or self.low >= self.high:
            raise ValueError(f"`low` must be below `high`. Received: low={self.low!r}, high={self.high!r}.")

    @property
    def is_strength(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without the defaults; `strength_from` gives an equal object back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def strength_from(value: Any, sae: int, feature: Any) -> Strength:
    """A `Strength` from itself or its dict; `adaptive` follows the edit's own latent, up to its typical maximum.

    Raises:
        TypeError: it is neither.
        ValueError: a field that strengths do not have, or a value that they do not take.
    """
    if getattr(value, "is_strength", False):  # by attribute: remote code has a class of its own
        return value
    if value == "adaptive":
        return Strength(feature, sae, high=1.0, unit="max")
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected a Strength, its dict or 'adaptive'. Received: {value!r}.")
    return from_mapping(Strength, value)
