"""How long parts tell how far they are, and where they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], object]  # (done, total), after each batch; total 0 where it is not known
# (what a part depends on, as JSON; what makes it) -> its tensors, on the CPU: made now, or by an earlier run
Keep = Callable[[Any, Callable[[], Mapping[str, "Tensor"]]], Mapping[str, "Tensor"]]


def keep_nothing(what: Any, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What `make` gives."""
    return make()


class Count:
    """Adds up what is done and reports it as (done, total), where somebody wants to know."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, count: int) -> None:
        """So much was done since the last call."""
        self.reached(self.done + count)

    def reached(self, done: int) -> None:
        """So much is done in all."""
        self.done, self.total = done, max(done, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)
