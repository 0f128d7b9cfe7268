"""The steering of an option, as JSON or a file of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_steering(given: str | Path) -> Any:
    """The `Steering` of --steering: JSON, or a file of it; also in a report that has one, as steer writes.

    Raises:
        ValueError: it is neither.
    """
    from ..modeling import Steering

    text = str(given)
    if is_file := not text.lstrip().startswith(("{", "[")):
        text = Path(text).read_text(encoding="utf-8")
    try:
        told = json.loads(text)
        return Steering.from_dict(told.get("steering", told) if isinstance(told, dict) else told)
    except (ValueError, TypeError) as error:
        named = f"{str(given)!r}: " if is_file else ""
        raise ValueError(f"--steering must be the JSON of a Steering. Received: {named}{error}") from error
