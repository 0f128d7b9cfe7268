"""A penalty on chosen features while a model is fine-tuned: declarative and JSON, as steering is.

    v[t, i]  what is read of feature i at token t, by a frozen SAE                       (`of`)
    c[t, i]  |v|,  relu(v - margin),  relu(margin - v)  or  |v - v of a reference|       (`goal`)
    loss    += weight * sum_t sum_i w_i c[t, i]^power / (n sum_i w_i)                    (t in `over`)

n is the number of tokens with an LM label in the whole accumulated batch, as in the LM's own loss. Penalties on
pre-activations of language features are SASFT (https://huggingface.co/papers/2507.14894).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from .checked_values import check_feature, check_sae_number, finite_number, from_mapping

OF = ("pre_activation", "activation", "share")
OVER = ("all", "answer", "mask")
GOALS = ("below", "above", "zero", "reference")


@dataclass(frozen=True)
class FeaturePenalty:
    """A term of the loss that holds features of an SAE where they should be. The gradient goes to the model that the
    SAE reads, never to the SAE.

    Args:
        features: an index of a latent or its name, a list of these, or a dict with a weight for each. The cost of a
            token is the weighted mean over features.
        sae: number of the SAE in the model. The state that it reads is what the model's steering has made of it up to
            there.
        weight: of the term in the loss, 0 or more. 0: it is reported and not trained.
        of: `pre_activation` (of a gated SAE the gate's), which has a gradient where the latent is off, too;
            `activation`; or `share`, the latent's part of the stream: activation * |W_dec row| / |hidden state|, in
            the units of the hidden state.
        over: whose tokens count. `answer`: those that predict a token with a label. `all`: all real tokens. `mask`:
            those of `penalty_mask` (batch, seq), an argument of the forward pass; a classifier has this and `all`.
        goal: `below`, the value costs what it is above the margin; `above`, what it is below it; `zero`, its
            magnitude; `reference`, its distance from the value in a reference model: this one without its LoRA, or
            that of `model.set_penalty_reference`.
        margin: of `below` and `above`: a number, or one for each feature, such as their means on texts that are as
            they should be (SASFT).
        power: 1, or 2 for squares.
        skip_first: leading tokens of each text that never count: the first is an outlier.
        name: in `sae_losses` it goes by `penalty_NAME`; by default its number among the penalties.

    Raises:
        ValueError: no features, a feature twice, a number that is not finite, or an unknown word.
    """

    features: Any
    sae: int = 0
    weight: float = 1.0
    of: str = "pre_activation"
    over: str = "answer"
    goal: str = "below"
    margin: Any = 0.0
    power: int = 1
    skip_first: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", _weighted(self.features))
        check_sae_number(self.sae)
        object.__setattr__(self, "weight", finite_number("weight", self.weight))
        if self.weight < 0:
            raise ValueError(
                f"`weight` must be 0 or more; goal='above' is what asks for more of a feature. "
                f"Received: weight={self.weight!r}."
            )
        for name, choices in (("of", OF), ("over", OVER), ("goal", GOALS)):
            if getattr(self, name) not in choices:
                known, given = ", ".join(map(repr, choices)), getattr(self, name)
                raise ValueError(f"`{name}` must be one of {known}. Received: {name}={given!r}.")
        object.__setattr__(self, "margin", self._checked_margin())
        if isinstance(self.power, bool) or self.power not in (1, 2):
            raise ValueError(f"`power` must be 1 or 2. Received: power={self.power!r}.")
        if isinstance(self.skip_first, bool) or not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise ValueError(f"`skip_first` must be a count of tokens. Received: skip_first={self.skip_first!r}.")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ValueError(f"`name` must be a word, or None. Received: name={self.name!r}.")

    def _checked_margin(self) -> float | tuple[float, ...]:
        several = isinstance(self.margin, (list, tuple))
        if several and len(self.margin) != len(self.features):
            raise ValueError(
                f"`margin` must be a number, or one for each of the {len(self.features)} feature(s). "
                f"Received: {len(self.margin)} numbers."
            )
        margins = tuple(finite_number("margin", one) for one in (self.margin if several else [self.margin]))
        if any(margins) and self.goal not in ("below", "above"):
            raise ValueError(
                f"`margin` goes with goal='below' or 'above'. Received: margin={self.margin!r}, goal={self.goal!r}."
            )
        return margins if several else margins[0]

    @property
    def is_penalty(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without the defaults; `penalty_from` gives an equal object back."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "features":
                even = all(weight == 1 for _, weight in value)
                found["features"] = [feature if even else [feature, weight] for feature, weight in value]
            elif value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else value
        return found


def _weighted(features: Any) -> tuple[tuple[int | str, float], ...]:
    """(feature, weight) pairs of what was given."""
    if isinstance(features, (int, str)):
        pairs: list[tuple[Any, Any]] = [(features, 1.0)]
    elif isinstance(features, Mapping):
        pairs = list(features.items())
    elif isinstance(features, Iterable):
        pairs = [tuple(one) if isinstance(one, (list, tuple)) and len(one) == 2 else (one, 1.0) for one in features]
    else:
        raise ValueError(
            f"`features` must be indices of latents or their names, or a dict with a weight for each. "
            f"Received: features={features!r}."
        )
    if not pairs:
        raise ValueError(f"A penalty needs at least one feature. Received: features={features!r}.")
    for feature, weight in pairs:
        check_feature(feature)
        if finite_number(f"features[{feature!r}]", weight) <= 0:
            raise ValueError(f"The weight of a feature must be above 0. Received: features[{feature!r}]={weight!r}.")
    if len({feature for feature, _ in pairs}) < len(pairs):
        raise ValueError(f"A feature is there twice. Received: features={features!r}.")
    return tuple((feature, float(weight)) for feature, weight in pairs)


def penalty_from(value: Any) -> FeaturePenalty:
    """A `FeaturePenalty` from itself or its dict.

    Raises:
        TypeError: it is neither.
        ValueError: a field that penalties do not have, or a value that they do not take.
    """
    if getattr(value, "is_penalty", False):  # by attribute: remote code has a class of its own
        return value
    if not isinstance(value, Mapping) or "features" not in value:
        raise TypeError(
            f"Expected a FeaturePenalty or its dict, which has `features`. Received: {type(value).__name__} {value!r}."
        )
    return from_mapping(FeaturePenalty, value)


def penalties_from(values: Any) -> tuple[FeaturePenalty, ...]:
    """What may be given for the penalties of a model: None, one, or a list."""
    if values is None:
        return ()
    if isinstance(values, Mapping) or getattr(values, "is_penalty", False):
        values = [values]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"`feature_penalties` must be a list of FeaturePenalty. Received: {values!r}.")
    return tuple(penalty_from(value) for value in values)


class BoundPenalty(NamedTuple):
    """A penalty with the latents that its features are in a model's SAE.

    features: (m) latents. weights: of each, they add up to 1. margins: of each.
    """

    penalty: FeaturePenalty
    name: str
    features: tuple[int, ...]
    weights: tuple[float, ...]
    margins: tuple[float, ...]


def bind_penalties(penalties: Sequence[FeaturePenalty], configs: Sequence[Any]) -> tuple[BoundPenalty, ...]:
    """Penalties of a model whose SAEs have these configs.

    Raises:
        ValueError: an SAE or a feature that is not there, one latent under two names, or two penalties of one name.
    """
    bound = []
    for number, penalty in enumerate(penalties):
        if penalty.sae >= len(configs):
            raise ValueError(f"The model has {len(configs)} SAE(s), numbered from 0. Received: sae={penalty.sae!r}.")
        latents = tuple(configs[penalty.sae].resolve_feature(feature) for feature, _ in penalty.features)
        if len(set(latents)) < len(latents):
            raise ValueError(f"Two of the features are one latent. Received: {penalty.features!r}, latents {latents}.")
        total = sum(weight for _, weight in penalty.features)
        margin = penalty.margin
        bound.append(
            BoundPenalty(
                penalty,
                f"penalty_{number if penalty.name is None else penalty.name}",
                latents,
                tuple(weight / total for _, weight in penalty.features),
                margin if isinstance(margin, tuple) else (margin,) * len(latents),
            )
        )
    names = [one.name for one in bound]
    if len(set(names)) < len(names):
        raise ValueError(f"Each penalty needs a name of its own. Received: {', '.join(names)}.")
    return tuple(bound)


def stored_penalties(bound: Sequence[BoundPenalty], configs: Sequence[Any]) -> list[dict[str, Any]]:
    """Penalties as a config holds them: a feature that only annotations name, which may not be at hand later, goes by
    its number."""
    stored = []
    for one in bound:
        entry, values = configs[one.penalty.sae], one.penalty.to_dict()
        known = {*entry.concepts, *entry.feature_names.values()}
        pairs = [
            (latent if isinstance(given, str) and given not in known else given, weight)
            for latent, (given, weight) in zip(one.features, one.penalty.features, strict=True)
        ]
        even = all(weight == 1 for _, weight in pairs)
        values["features"] = [feature if even else [feature, weight] for feature, weight in pairs]
        stored.append(values)
    return stored
