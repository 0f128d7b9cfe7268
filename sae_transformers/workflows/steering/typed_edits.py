"""Steerings as one types them: `0=-100`, `rivers=3x`, `1:joy=-0.2n/0.2n`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ...modeling import FeatureEdit, Steering
from ...modeling.feature_edits import WITHOUT_VALUE
from ..loading import read_steering
from ..settings.generate import TypedSteering, parse_feature

UNITS = {"x": "max", "n": "norm", "": "absolute"}
ALL_BUT_FIRST = ((1, None),)
AMOUNT = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)([xn]?)\s*"


class _TypedEdit(NamedTuple):
    """labels, edits: one per value that was typed, in that order."""

    labels: list[str]
    edits: list[FeatureEdit]


def typed_steerings(typed: TypedSteering, model: str | None = None) -> dict[str, Steering]:
    """Steerings from text, each under what it does; none where nothing is typed.

    Args:
        typed: an edit with several values makes as many steerings; edits with one value are in each of them.
        model: folder or Hub id where a steering is looked up by name.

    Raises:
        ValueError: an edit cannot be read, edits have different numbers of values, or a steering that strengths
            cannot multiply.
        OSError: no such steering.
    """
    if typed.steering is not None:
        found = read_steering(typed.steering, model)
        name = "steered" if typed.steering.lstrip().startswith(("{", "[")) else Path(typed.steering).stem
        return multiplied(found, typed.strengths, name) if typed.strengths else {name: found}
    edits = [_typed_edit(op, text) for op, texts in typed.edits.items() for text in texts]
    counts = {len(edit.edits) for edit in edits} - {1}
    if len(counts) > 1:
        given = "; ".join(", ".join(edit.labels) for edit in edits)
        raise ValueError(f"Edits with several values need equally many. Received: {given}.")
    if typed.positions is not None:
        where = parse_positions(typed.positions)
    else:
        where = ALL_BUT_FIRST if all(edit.edits[0].op == "direction" for edit in edits) else "all"
    steerings = {}
    for number in range(max(counts, default=1)) if edits else ():
        chosen = [(edit, number if len(edit.edits) > 1 else 0) for edit in edits]
        label = ", ".join(edit.labels[n] for edit, n in chosen)
        each = [edit.edits[n] for edit, n in chosen]
        steerings[label] = Steering(each, positions=where, keep_error=not typed.drop_error)
    return steerings


def multiplied(steering: Steering, factors: Sequence[float], label: str = "steering") -> dict[str, Steering]:
    """A steering with the values of its edits times each factor, under `label x factor`.

    Raises:
        ValueError: an edit that is no amount: a re-weighting, `ablate`, `erase`, `scale`.
    """
    fixed = ["re-weighting"] if steering.reweightings else []
    fixed += [edit.op for edit in steering.feature_edits if edit.op in (*WITHOUT_VALUE, "scale", "scale_magnitude")]
    if fixed:
        raise ValueError(
            f"Strengths multiply what edits add or set. Received: a steering with {', '.join(dict.fromkeys(fixed))}."
        )
    return {
        f"{label} x {factor:g}": replace(
            steering, edits=[replace(edit, value=(edit.value or 0) * factor) for edit in steering.feature_edits]
        )
        for factor in factors
    }


def parse_positions(text: str) -> str | list[tuple[int | None, int | None]]:
    """`prompt` as it is; `1:` or `0:-1,5:7` as ranges.

    Raises:
        ValueError: ranges that cannot be read.
    """
    if ":" not in text:
        return text
    parts = [re.fullmatch(r"\s*(-?\d+)?:(-?\d+)?\s*", part) for part in text.split(",")]
    if None in parts:
        raise ValueError(f"`positions` must be a name, or ranges such as 1: or 0:-1,5:7. Received: {text!r}.")
    return [(int(part[1]) if part[1] else None, int(part[2]) if part[2] else None) for part in parts if part]


def _typed_edit(op: str, text: str) -> _TypedEdit:
    if op in WITHOUT_VALUE:
        sae, feature = parse_feature(text.strip())
        return _TypedEdit([f"{op} {text.strip()}"], [FeatureEdit(sae, feature, op)])
    name, equals, values = (part.strip() for part in text.rpartition("="))
    if not equals or not name:
        raise ValueError(f"An edit must be FEATURE=VALUE, such as 0=-100 or rivers=3x. Received: {op} {text!r}.")
    sae, feature = parse_feature(name)
    found = _TypedEdit([], [])
    for value in values.split("/"):
        amount = re.fullmatch(AMOUNT, value)
        if amount is None:
            raise ValueError(
                f"A value must be a number, followed by x for largest activations of the feature, by n for norms of "
                f"the hidden state. Received: {value.strip()!r} in {op} {text!r}."
            )
        found.labels.append(f"{op} {name}={amount[1]}{amount[2]}")
        found.edits.append(FeatureEdit(sae, feature, op, float(amount[1]), UNITS[amount[2]]))
    return found
