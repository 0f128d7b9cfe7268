"""From bodies to what is asked for: how long a body may take, how many bytes are held, how many are read at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from .bodies import Body, read_json
from .errors import RequestError
from .limits import ServeLimits

T = TypeVar("T")

MAX_BODY_BYTES = 8 * 2**20
MAX_HELD_BYTES = 32 * MAX_BODY_BYTES  # of all requests together
# Long bodies are read one after the other, beside the short ones, which so never wait for a long one.
LONG_BODY_BYTES, SHORT_AT_ONCE, LONG_AT_ONCE = 2**16, 4, 1
MAX_DETECTIONS = 64  # that wait or are at work; one is at work


class Intake:
    """Receives bodies and hands them to threads that read them, for one event loop.

    `held` are the bytes of bodies that are being received or read.
    """

    def __init__(self, limits: ServeLimits) -> None:
        self.limits = limits
        self.held = 0
        self._since: dict[object, float] = {}

    @cached_property
    def _short(self) -> CapacityLimiter:  # made where they are first used: in the event loop
        return CapacityLimiter(SHORT_AT_ONCE)

    @cached_property
    def _long(self) -> CapacityLimiter:
        return CapacityLimiter(LONG_AT_ONCE)

    @cached_property
    def _detecting(self) -> CapacityLimiter:
        return CapacityLimiter(1)

    @property
    def blocked_s(self) -> float:
        """Seconds for which the oldest body has waited for a thread, or been in it."""
        return time.monotonic() - min(self._since.values(), default=time.monotonic())

    async def receive(self, request: Request) -> bytes:
        """The body, which `read` or `forget` takes back.

        Raises:
            RequestError: no JSON by its header (which a page in a browser could send unasked), too long, too slow, or
                more than is held at once.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("The body must be JSON, with the header `Content-Type: application/json`.")
        raw = bytearray()
        try:
            await asyncio.wait_for(self._receive(request, raw), self.limits.receive_s)
        except BaseException as error:
            self.held -= len(raw)
            if isinstance(error, ClientDisconnect):
                raise RequestError("The client closed the connection.", code="client_gone", status=499) from None
            if isinstance(error, asyncio.TimeoutError):
                told = f"The body did not come within {self.limits.receive_s:g} seconds."
                raise RequestError(told, code="too_slow", status=408) from None
            raise
        return bytes(raw)

    async def _receive(self, request: Request, raw: bytearray) -> None:
        async for part in request.stream():
            raw += part
            self.held += len(part)
            if len(raw) > MAX_BODY_BYTES:
                told = f"The body is longer than {MAX_BODY_BYTES} bytes."
                raise RequestError(told, code="body_too_long", status=413)
            if self.held > MAX_HELD_BYTES:
                raise RequestError("Too many long requests at once.", code="busy", status=503)

    async def read(self, raw: bytes, ask: Callable[[Body], T]) -> T:
        """What a body asks for, read in a thread: JSON, tokens and steering take time."""
        try:
            with self._timed():
                limiter = self._long if len(raw) > LONG_BODY_BYTES else self._short
                return await to_thread.run_sync(lambda: ask(Body(read_json(raw))), limiter=limiter)
        finally:
            self.held -= len(raw)

    async def detect(self, work: Callable[[], T]) -> T:
        """The result of a detection, when those before it are done.

        Raises:
            RequestError: too many wait already.
        """
        waiting = self._detecting.statistics()
        if waiting.tasks_waiting + waiting.borrowed_tokens >= MAX_DETECTIONS:
            raise RequestError(f"{waiting.tasks_waiting} detections wait already.", code="queue_full", status=429)
        return await to_thread.run_sync(work, limiter=self._detecting)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        mark = object()
        self._since[mark] = time.monotonic()
        try:
            yield
        finally:
            del self._since[mark]
