"""Conditions on which steering acts: declarative and JSON, as the rest of it.

What is compared is a latent of any SAE of the model that runs before the edit. A gate sees no token that comes after
the one it is asked about, so a text read at once, in chunks and token by token opens it at the same places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .checked_values import check_feature, check_sae_number, finite_number, from_mapping

OVER = ("token", "last", "prompt", "so_far")
POOLS = ("max", "mean")
MOST_SKIPPED = 2**31 - 1


@dataclass(frozen=True)
class Gate:
    """Open where a latent's value is above a threshold. `a & b`, `a | b` and `~a` combine gates.

    Args:
        feature: index of the latent, or its name; of an SAE of directions (`direction_sae`) a condition on these.
        sae: number of the SAE in the model.
        above: the value must be larger. 0 means active, for latents that are never negative.
        until: once open, it stays open from token to token while the value is larger than this (hysteresis), with
            `over="token"`.
        over: whose value it is. `token`: each token's own. `last`: the last token's of the prompt. `prompt`: of all
            its tokens, pooled. `so_far`: of all tokens up to each, pooled. What the prompt decides holds from its last
            token on, before it the gate is shut.
        skip_first: leading tokens of each text that are not read: they count in no pool, and no value of theirs is
            above the threshold. The first is a sink of attention, whose state after some layers is an outlier.
        pool: of `prompt` and `so_far`: `max` or `mean`.
        pre_activations: compare the pre-activation (of a gated SAE the gate's), by which concept latents are trained.
        every: gates that must all be open, in place of a latent.
        some: gates of which one must be open, in place of a latent.
        negate: open where it would be shut.

    Raises:
        ValueError: a threshold that is no number, an unknown word, or both a latent and gates.
    """

    feature: int | str | None = None
    sae: int = 0
    above: float = 0.0
    until: float | None = None
    over: str = "token"
    pool: str = "max"
    pre_activations: bool = False
    skip_first: int = 0
    every: Sequence[Gate] = ()
    some: Sequence[Gate] = ()
    negate: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "some"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise TypeError(f"`{name}` must be a list of gates. Received: {name}={value!r}.")
            object.__setattr__(self, name, tuple(gate_from(one) for one in value))
        for name in ("pre_activations", "negate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False. Received: {name}={getattr(self, name)!r}.")
        kinds = (self.feature is not None) + bool(self.every) + bool(self.some)
        if kinds != 1:
            raise ValueError(
                f"A gate is a condition on `feature`, or `every` or `some` of other gates. Received: {kinds} of these."
            )
        if self.feature is not None:
            self._check_condition()

    def _check_condition(self) -> None:
        check_sae_number(self.sae)
        check_feature(self.feature)
        count = self.skip_first
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_SKIPPED:
            raise ValueError(f"`skip_first` must be a number of tokens, 0 or more. Received: skip_first={count!r}.")
        for name, choices in (("over", OVER), ("pool", POOLS)):
            if getattr(self, name) not in choices:
                known_words, given = ", ".join(map(repr, choices)), getattr(self, name)
                raise ValueError(f"`{name}` must be one of {known_words}. Received: {name}={given!r}.")
        for name in ("above", "until"):
            value = getattr(self, name)
            if name == "until" and value is None:
                continue
            object.__setattr__(self, name, finite_number(name, value))
        if self.until is not None and (self.over != "token" or self.until > self.above):
            raise ValueError(
                f"`until` goes with over='token' and is at most `above`. Received: until={self.until!r}, "
                f"above={self.above!r}, over={self.over!r}."
            )

    def __and__(self, other: Gate) -> Gate:
        return Gate(every=(self, other))

    def __or__(self, other: Gate) -> Gate:
        return Gate(some=(self, other))

    def __invert__(self) -> Gate:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Gate(**{**values, "negate": not self.negate})

    @property
    def conditions(self) -> Iterator[Gate]:
        """The conditions on latents that it is made of, none of them negated."""
        if self.feature is not None:
            yield ~self if self.negate else self
        for gate in (*self.every, *self.some):
            yield from gate.conditions

    @property
    def is_gate(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without the defaults; `gate_from` gives an equal object back."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = [gate.to_dict() for gate in value] if isinstance(value, tuple) else value
        return found


def gate_from(value: Any) -> Gate:
    """A `Gate` from itself or its dict.

    Raises:
        TypeError: it is neither.
        ValueError: a field that gates do not have, or a value that they do not take.
    """
    if getattr(value, "is_gate", False):  # by attribute: remote code has a class of its own
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"Expected a Gate or its dict. Received: {type(value).__name__}.")
    return from_mapping(Gate, value)
