"""Parts of something long: made, or what an earlier run made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

# (what a part depends on, as JSON; what makes it) -> its tensors, on the CPU
Keep = Callable[[Any, Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]]


def keep_nothing(what: Any, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What `make` gives."""
    return make()
