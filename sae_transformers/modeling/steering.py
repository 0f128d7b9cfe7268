"""Steering as a declaration: which latents change, how, and at which tokens. Plain data with a JSON form.

    steering = Steering([FeatureEdit(feature=0, op="scale", value=-2.0)], positions="generated")
    model.generate(**inputs, steering=steering)

Every elementwise op maps a latent z to z'. With `keep_error` the hidden state becomes
`h + sum_i (z'_i - z_i) * W_dec[i]` (times the denormalisation where the SAE normalises its input), so what the SAE
cannot reconstruct stays; without it the hidden state is replaced by `decode(z')`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from .checked_values import from_mapping
from .excluded_tokens import checked_tokens, ids_of
from .feature_edits import FeatureEdit, FeatureReweighting, edit_from
from .gates import Gate, gate_from
from .strength import WITHOUT_STRENGTH, Strength, strength_from

# [start, stop) pairs: negative ones and END from the end of the prompt, None for open.
END = "end"
POSITIONS = {
    "all": ((None, None),),
    "prompt": ((None, END),),
    "generated": ((-1, None),),
    "last_prompt": ((-1, END),),
}
FAR = 2**31  # further than any position
OF_EDITS = ("when", "strength", "exclude_tokens")  # what an edit may have of its own beside the whole


@dataclass(frozen=True)
class Steering:
    """A set of edits, applied together.

    Args:
        edits: `FeatureEdit`s and `FeatureReweighting`s; several on one latent apply in order.
        positions: `all`; `prompt`; `generated` (every position whose output is a new token, so from the last prompt
            token on); `last_prompt`; or a list of [start, stop) pairs in absolute positions, counted from each row's
            first real token, negative ones from the end of the prompt, None for open: `[(-1, None)]` is `generated`.
            A mask over the prompt's tokens goes to `generate` or `forward` as `steering_mask`.
        keep_error: whether what the SAE does not reconstruct stays in the hidden state.
        reconstruct: numbers of SAEs that replace the hidden state by their output even without an edit.
        balance: spread the opposite of the total change evenly over the latents that were not edited, so that the sum
            of the code is kept (SCAR's `mod_balance`).
        when: a `Gate` or its dict: all of it acts where that is open, an edit with a gate of its own where both are.
        exclude_tokens: ids of tokens at which nothing is changed, in the prompt and among generated ones; or
            `special`, `bos`, `chat` (the template's markers), which `with_tokenizer` turns into ids.
        strength: a `Strength` or its dict: how far every edit goes at each token, times the edit's own.
        receipt: what was measured of it (`Receipt.to_dict()`), as JSON; it changes nothing that is done, and two
            steerings that differ by it alone are equal. `dataclasses.replace` takes it along: give `receipt=None`
            where an edit changes.
    """

    edits: Sequence[FeatureEdit | FeatureReweighting] = ()
    positions: str | Sequence[tuple[int | None, int | None]] = "all"
    keep_error: bool = True
    reconstruct: tuple[int, ...] = ()
    balance: bool = False
    when: Gate | Mapping[str, Any] | None = None
    exclude_tokens: Sequence[int | str] = ()
    strength: Strength | Mapping[str, Any] | None = None
    receipt: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        edits = self.edits
        if isinstance(edits, (FeatureEdit, FeatureReweighting)):
            edits = (edits,)
        for name, values in (("edits", edits), ("reconstruct", self.reconstruct)):
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise TypeError(f"`{name}` must be a list. Received: {name}={values!r}.")
        for name in ("keep_error", "balance"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False. Received: {name}={getattr(self, name)!r}.")
        edits = tuple(edit_from(e) for e in edits)
        object.__setattr__(self, "edits", edits)
        object.__setattr__(self, "positions", _checked_positions(self.positions))
        object.__setattr__(self, "reconstruct", tuple(self.reconstruct))
        object.__setattr__(self, "exclude_tokens", checked_tokens(self.exclude_tokens))
        object.__setattr__(self, "when", None if self.when is None else gate_from(self.when))
        object.__setattr__(self, "receipt", _checked_receipt(self.receipt))
        self._take_strength()
        own = [name for name in OF_EDITS if any(getattr(edit, name) for edit in self.feature_edits)]
        if own and (self.balance or self.reweightings):
            raise ValueError(
                f"Edits with a gate, a strength or tokens of their own do not go with `balance` or a re-weighting, "
                f"which are about a whole code. Expected `when` of the Steering. Received: `{own[0]}` of an edit."
            )
        for number in self.reconstruct:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(
                    f"`reconstruct` must hold numbers of SAEs. Received: reconstruct={self.reconstruct!r}."
                )
        reweighted = [e.sae for e in self.reweightings]
        if len(set(reweighted)) != len(reweighted):
            raise ValueError(f"One SAE can be re-weighted once only. Received: re-weightings of SAEs {reweighted}.")
        self._keep_hash()

    def _take_strength(self) -> None:
        if self.strength is None:
            return
        if self.strength == "adaptive":
            raise ValueError(
                "'adaptive' follows an edit's own latent. Expected it as the `strength` of edits, or a `Strength` "
                "here. Received: strength='adaptive' of a Steering."
            )
        object.__setattr__(self, "strength", strength_from(self.strength, 0, None))
        whole = [name for name in ("balance", "reconstruct", "reweightings") if getattr(self, name)]
        whole += [edit.op for edit in self.feature_edits if edit.op in WITHOUT_STRENGTH]
        if whole:
            raise ValueError(
                f"`{whole[0]}` is done or not and takes no strength; use `when`. Received: the strength of a Steering."
            )

    def _keep_hash(self) -> None:
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self) if f.compare)))

    def __hash__(self) -> int:  # kept: there may be thousands of edits, and each token looks its plan up
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._keep_hash()  # another process hashes texts in another way

    def __bool__(self) -> bool:
        return bool(self.edits or self.reconstruct)

    # By attribute and not by class: `isinstance` fails between a class and its copy in remote code.
    @property
    def feature_edits(self) -> list[FeatureEdit]:
        """The edits of single latents, in order."""
        return [edit for edit in self.edits if hasattr(edit, "op")]  # pyright: ignore[reportReturnType]

    @property
    def reweightings(self) -> list[FeatureReweighting]:
        """The re-weightings of whole codes, at most one for each SAE."""
        return [edit for edit in self.edits if hasattr(edit, "scores")]  # pyright: ignore[reportReturnType]

    @property
    def bounds(self) -> tuple[tuple[Any, Any], ...]:
        """`positions` as [start, stop) pairs, `END` for the end of the prompt; none where there is no edit."""
        if not self:
            return ()
        return POSITIONS[self.positions] if isinstance(self.positions, str) else tuple(self.positions)

    def ranges(self, prompt_length: int) -> list[tuple[int, int]]:
        """Where it applies in a text whose prompt has `prompt_length` tokens: [start, stop) positions in order,
        without overlap, `FAR` where they are open. What an engine needs that places steering token by token."""

        def place(bound: Any, otherwise: int) -> int:
            if bound is None:
                return otherwise
            return prompt_length if bound == END else bound + prompt_length if bound < 0 else bound

        found = sorted((max(0, place(start, 0)), place(stop, FAR)) for start, stop in self.bounds)
        merged: list[tuple[int, int]] = []
        for start, stop in found:
            if start >= stop:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return merged

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back."""
        edits = []
        for edit in self.edits:
            values = {f.name: getattr(edit, f.name) for f in fields(edit)}
            if not values.get("exclude_tokens", True):
                del values["exclude_tokens"]
            edits.append(_with_gate({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}))
        positions = self.positions if isinstance(self.positions, str) else [list(p) for p in self.positions]
        own: dict[str, Any] = {"keep_error": self.keep_error, "balance": self.balance, "when": self.when}
        own["strength"] = self.strength
        shown = {"edits": edits, "positions": positions, "reconstruct": list(self.reconstruct)}
        if self.exclude_tokens:
            shown["exclude_tokens"] = list(self.exclude_tokens)
        if self.receipt is not None:
            shown["receipt"] = copy.deepcopy(self.receipt)
        told = {**own, **shown}
        return _with_gate({f.name: told[f.name] for f in fields(self) if f.name in told})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Steering:
        """What `to_dict` gave. Raises TypeError where it is no mapping, ValueError for fields that do not exist."""
        if not isinstance(values, Mapping):
            raise TypeError(f"Steering as JSON must be an object. Received: {values!r}.")
        return from_mapping(cls, values)

    def to_json(self) -> str:
        """`to_dict` as text; `from_json` gives an equal object back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Steering:
        """What `to_json` gave. Raises ValueError where the text is no JSON, and as `from_dict`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Steering as text must be JSON: {error}. Received: {text!r}.") from error
        return cls.from_dict(values)

    @property
    def digest(self) -> str:
        """sha256 of what it does, as JSON with sorted keys: the receipt is no part of it."""
        return hashlib.sha256(json.dumps(without_receipt(self), sort_keys=True).encode()).hexdigest()

    def with_tokenizer(self, tokenizer: Any) -> Steering:
        """The same with ids in place of the names in `exclude_tokens`: what a model takes. Itself where there are
        none.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        lists = [self.exclude_tokens, *(edit.exclude_tokens for edit in self.feature_edits)]
        if not any(isinstance(token, str) for tokens in lists for token in tokens):
            return self
        edits = []
        for edit in self.edits:
            tokens = getattr(edit, "exclude_tokens", ())  # a re-weighting has none
            edits.append(replace(edit, exclude_tokens=ids_of(tokens, tokenizer)) if tokens else edit)
        return replace(self, edits=edits, exclude_tokens=ids_of(self.exclude_tokens, tokenizer))

    @classmethod
    def coerce(cls, value: Any) -> Steering:
        """A `Steering` from itself, its dict, its JSON text, one edit, or a list of edits; False and None are no
        edit."""
        if value is None or value is False:
            return cls()
        if getattr(value, "is_steering", False):
            return value
        if isinstance(value, str):
            return cls.from_json(value)
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, Sequence) or hasattr(value, "op") or hasattr(value, "scores"):
            return cls(value)  # pyright: ignore[reportArgumentType]
        raise TypeError(f"Expected a Steering, its dict or its JSON, or edits. Received: {type(value).__name__}.")

    def gate_of(self, edit: FeatureEdit | FeatureReweighting | None = None) -> Gate | None:
        """The gate that must be open for an edit, or for what is no edit, such as `reconstruct`."""
        whole, own = cast("Gate | None", self.when), cast("Gate | None", getattr(edit, "when", None))
        if whole is None or own is None:
            return whole if own is None else own
        return whole & own

    @property
    def is_gated(self) -> bool:
        """Whether anything of it has a gate."""
        return self.when is not None or any(edit.when is not None for edit in self.feature_edits)

    def strengths_of(self, edit: FeatureEdit) -> list[Strength]:
        """Whose factors an edit goes by, all of them multiplied: its own and that of the whole."""
        return [cast("Strength", one) for one in (edit.strength, self.strength) if one is not None]

    @property
    def strengths(self) -> list[Strength]:
        """The strengths of edits that follow the token, and that of the whole."""
        return list(dict.fromkeys(one for edit in self.feature_edits for one in self.strengths_of(edit)))

    @property
    def is_steering(self) -> bool:
        return True


def without_receipt(steering: Steering) -> dict[str, Any]:
    """`to_dict` without what was measured of it: what it does, for records and for comparisons."""
    return {name: value for name, value in steering.to_dict().items() if name != "receipt"}


def _with_gate(values: dict[str, Any]) -> dict[str, Any]:
    """`when` and `strength` as plain values, and left out where there are none: files from before are as they were."""
    for name in ("when", "strength"):
        value = values.pop(name, None)
        if value is not None:
            values[name] = value.to_dict()
    return values


def _checked_receipt(receipt: Any) -> dict[str, Any] | None:
    """A copy, as JSON has it."""
    if receipt is None:
        return None
    if not isinstance(receipt, Mapping):
        raise TypeError(f"`receipt` must be an object as Receipt.to_dict() gives. Received: {type(receipt).__name__}.")
    try:
        return json.loads(json.dumps(dict(receipt), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`receipt` must hold plain JSON values. Received: an object with the fields {sorted(map(str, receipt))}: "
            f"{error}."
        ) from None


def _checked_positions(positions: Any) -> str | tuple[tuple[int | None, int | None], ...]:
    if isinstance(positions, str):
        if positions not in POSITIONS:
            raise ValueError(
                f"`positions` must be one of {', '.join(map(repr, POSITIONS))} or a list of [start, stop) pairs. "
                f"Received: positions={positions!r}."
            )
        return positions
    try:
        ranges = tuple((start, stop) for start, stop in positions)
    except (TypeError, ValueError):
        raise ValueError(
            f"`positions` must be a name or a list of [start, stop) pairs; a mask goes to `steering_mask`. "
            f"Received: positions={positions!r}."
        ) from None
    for bound in (b for pair in ranges for b in pair):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
            raise ValueError(f"`positions` must hold integers or None. Received: positions={positions!r}.")
    return ranges
