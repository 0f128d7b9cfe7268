"""How a call reaches the model: one at a time, and ended at the next forward pass when nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import torch
from torch import nn

Answer = TypeVar("Answer")


class GivenUp(Exception):
    """The client no longer waits."""


class OneAtATime:
    """Runs work on a model in a thread, one call after another.

    A call that is cancelled, or whose client has gone, ends at its next forward pass; one that waits never begins.

    Args:
        model: whose forward passes are watched.
    """

    def __init__(self, model: Any) -> None:
        self._embeddings: nn.Module = model.get_input_embeddings()
        self._lock = anyio.Lock()

    async def run(self, work: Callable[[], Answer]) -> Answer:
        """What `work` gives, or the error that it raises."""
        given_up = threading.Event()
        found: list[Answer] = []
        failed: list[Exception] = []  # kept, since a task group would put it into a group of its own

        def watched() -> None:
            try:
                with torch.no_grad(), self._ending(given_up):
                    found.append(work())
            except Exception as error:
                failed.append(error)

        async with self._lock, anyio.create_task_group() as group:
            group.start_soon(_set_at_the_end, given_up)
            try:
                await anyio.to_thread.run_sync(watched)  # shielded: the lock is held until the thread has ended
            finally:
                group.cancel_scope.cancel()
        for error in failed:
            raise error
        return found[0]

    @contextmanager
    def _ending(self, given_up: threading.Event) -> Iterator[None]:
        def check(*_: Any) -> None:
            if given_up.is_set():
                raise GivenUp

        handle = self._embeddings.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()


async def _set_at_the_end(event: threading.Event) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        event.set()
