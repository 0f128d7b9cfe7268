"""How long parts tell how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]  # (done, total), after each batch; total 0 where it is not known


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
