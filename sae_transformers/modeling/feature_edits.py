"""Changes of latents as data: of one latent, or of a whole code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .checked_values import check_feature, check_sae_number, finite_number, from_mapping
from .excluded_tokens import checked_tokens
from .gates import Gate, gate_from
from .strength import WITHOUT_STRENGTH, Strength, strength_from

OPS = {
    "add": "z + v",
    "scale": "v * z",
    "set": "v (clamp)",
    "ablate": "0",
    "erase": "0, and W_dec[i] taken out of the error that is kept",
    "at_least": "max(z, v)",
    "at_most": "min(z, v)",
    "shrink": "max(z - v, 0)",
    "direction": "no latent is read: h + v * W_dec[i]",
    "scale_magnitude": "v * |pre-activation|, what SCAR's code does for JumpReLU",
}
WITHOUT_VALUE = ("ablate", "erase")
UNITS = ("absolute", "max", "norm")


def _numbers(values: Any) -> tuple[float, ...]:
    """Scores as floats; texts are refused, though `float` would read digits out of them."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"`scores` must be a list of numbers. Received: scores={values!r}.")
    numbers = []
    for place, value in enumerate(values):
        try:
            number = None if isinstance(value, (str, bytes, bytearray)) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None:
            raise ValueError(f"`scores` must be a list of numbers. Received: scores[{place}]={value!r}.")
        numbers.append(number)
    return tuple(numbers)


@dataclass(frozen=True)
class FeatureEdit:
    """Change one latent.

    Args:
        sae: number of the SAE in the model.
        feature: index of the latent, or the name of a concept of that SAE.
        op: `add` z + v, `scale` v * z, `set` v, `ablate` 0, `at_least` max(z, v), `at_most` min(z, v), `shrink`
            max(z - v, 0), `erase` 0 and the decoder rows of all erased latents taken out of what the SAE does not
            reconstruct, `direction` h + v * W_dec[i] (nothing is encoded), or `scale_magnitude` (legacy, `OPS`).
        value: v; not given for `ablate` and `erase`.
        unit: of `value`: `absolute` activation; `max`, multiples of the latent's typical maximum (`feature_max`);
            `norm`, multiples of the hidden state's norm (the value whose write into the stream has that norm).
            `scale` takes no unit.
        when: a `Gate` or its dict: the edit acts where it is open. `active`: where the latent itself is above 0.
        strength: a `Strength` or its dict: how far the edit goes at each token. `adaptive`: by the latent itself, from
            0 to its typical maximum.
        exclude_tokens: tokens at which this edit does nothing, as of a `Steering`, beside those of the whole.
    """

    sae: int = 0
    feature: int | str | None = None
    op: str = "scale"
    value: float | None = None
    unit: str = "absolute"
    when: Gate | Mapping[str, Any] | str | None = None
    strength: Strength | Mapping[str, Any] | str | None = None
    exclude_tokens: Sequence[int | str] = ()

    def __post_init__(self) -> None:
        check_sae_number(self.sae)
        check_feature(self.feature)
        object.__setattr__(self, "exclude_tokens", checked_tokens(self.exclude_tokens))
        if self.when is not None:
            own = {"feature": self.feature, "sae": self.sae}
            object.__setattr__(self, "when", gate_from(own if self.when == "active" else self.when))
        if self.strength is not None:
            object.__setattr__(self, "strength", strength_from(self.strength, self.sae, self.feature))
            if self.op in WITHOUT_STRENGTH:
                raise ValueError(
                    f"`{self.op}` is done or not and takes no strength; use `when`. Received: a strength."
                )
        if self.op not in tuple(OPS):
            raise ValueError(f"`op` must be one of {', '.join(map(repr, OPS))}. Received: op={self.op!r}.")
        if self.unit not in UNITS:
            raise ValueError(f"`unit` must be one of {', '.join(map(repr, UNITS))}. Received: unit={self.unit!r}.")
        if self.op in WITHOUT_VALUE:
            if self.value is not None:
                raise ValueError(f"`{self.op}` takes no value; use 'set' for one. Received: value={self.value!r}.")
        else:
            object.__setattr__(self, "value", finite_number("value", self.value))
        if self.op in ("scale", "scale_magnitude", *WITHOUT_VALUE) and self.unit != "absolute":
            raise ValueError(f"`{self.op}` is relative already and takes no unit. Received: unit={self.unit!r}.")


@dataclass(frozen=True)
class FeatureReweighting:
    """Re-weight the whole code of one SAE by a score per latent, then select again (topic alignment).

    `weight`: z' = act(p * s). `swap`: the support of act(p * s) with the original pre-activations p as values.
    "Enabling precise topic alignment in large language models via sparse autoencoders"
    (https://huggingface.co/papers/2506.12576).

    Args:
        sae: number of the SAE in the model.
        scores: s, one finite non-negative number per latent.
        mode: `swap` or `weight`.
        legacy: for `weight`, denormalise with mean(s) and mean(s)**2 in place of the token's own statistics, as the
            original code does.
    """

    sae: int = 0
    scores: Sequence[float] = ()
    mode: str = "swap"
    legacy: bool = False

    def __post_init__(self) -> None:
        check_sae_number(self.sae)
        if self.mode not in ("swap", "weight"):
            raise ValueError(f"`mode` must be 'swap' or 'weight'. Received: mode={self.mode!r}.")
        if self.legacy and self.mode != "weight":
            raise ValueError(f"`legacy` concerns mode 'weight' only. Received: mode={self.mode!r}.")
        scores = _numbers(self.scores)
        bad = [i for i, s in enumerate(scores) if not math.isfinite(s) or s < 0]
        if bad or not scores:
            shown = f"scores[{bad[0]}]={scores[bad[0]]!r}" if bad else "none"
            raise ValueError(
                f"`scores` must hold one finite, non-negative number per latent; replace NaN (a latent that never "
                f"fired) by 0. "
                f"Received: {shown}."
            )
        object.__setattr__(self, "scores", scores)


def edit_from(edit: Any) -> FeatureEdit | FeatureReweighting:
    if isinstance(edit, Mapping):
        return from_mapping(FeatureReweighting if "scores" in edit else FeatureEdit, edit)
    if hasattr(edit, "scores") or hasattr(edit, "op"):
        return edit
    raise TypeError(f"`edits` must hold FeatureEdit or FeatureReweighting objects or their dicts. Received: {edit!r}.")
