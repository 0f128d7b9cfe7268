"""What the fields of edits, gates and strengths must be, whether they come from Python or from JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def finite_number(name: str, value: Any) -> float:
    try:
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        finite = False
    if not finite:
        raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}.")
    return float(value)


def check_sae_number(sae: Any) -> None:
    if isinstance(sae, bool) or not isinstance(sae, int) or sae < 0:
        raise ValueError(f"`sae` must be the number of an SAE, from 0. Received: sae={sae!r}.")


def check_feature(feature: Any) -> None:
    known = isinstance(feature, (int, str)) and not isinstance(feature, bool)
    if not known or (isinstance(feature, int) and feature < 0):
        raise ValueError(f"`feature` must be an index of a latent or its name. Received: feature={feature!r}.")


def from_mapping(cls: type, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"Unknown fields {unknown} of {cls.__name__}. Known: {', '.join(known)}.")
    return cls(**values)
