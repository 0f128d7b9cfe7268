"""Connections that take too long, and more of them than are served."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RequestError
from ..limits import ServeLimits

SPARE = 64  # connections beyond the limit that are told so; those beyond are closed without a word
TOLD_S = 1.0  # that an application has to say itself that a body was too slow
LEAST_BYTES_TAKEN = 2**16  # of an answer, in `receive_s`
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class LimitedConnection(H11Protocol):
    """One connection: its client has a time for the head of a request, for its body, and to take an answer.

    uvicorn closes connections between two requests; nothing times a request that has begun. What is read of uvicorn
    beyond `asyncio.Protocol`: `conn`, the state of h11; `connections`; `app`; `timeout_keep_alive_task`, which is set
    between two requests; and `on_response_complete`, after which the head of the next request may have come already.
    """

    limits = ServeLimits()

    _stage: Any = None
    _deadline: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _left = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` is called while anything is not taken
        beyond = len(self.connections) - self.limits.max_connections
        if beyond > SPARE:
            transport.abort()
        elif beyond > 0:
            self.app = too_many
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Begin the time of what is waited for now; of what goes on being waited for, it runs on."""
        stage = self.conn.their_state
        if stage is h11.IDLE and self.timeout_keep_alive_task is not None:
            stage = None
        if stage is self._stage:
            return
        self._stage = stage
        if self._deadline is not None:
            self._deadline.cancel()
        time_s = {h11.IDLE: self.limits.receive_s, h11.SEND_BODY: self.limits.receive_s + TOLD_S}.get(stage)
        self._deadline = None if time_s is None else self.loop.call_later(time_s, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.our_state is h11.IDLE:
            self.transport.write(TOO_SLOW)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._left = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(self.limits.receive_s, self._check_taken)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _check_taken(self) -> None:
        before, self._left = self._left, self.transport.get_write_buffer_size()
        if before - self._left < LEAST_BYTES_TAKEN:
            self.transport.abort()
        else:
            self._taking = self.loop.call_later(self.limits.receive_s, self._check_taken)


async def too_many(scope: Any, receive: Any, send: Any) -> None:
    """An application that sends its clients away."""
    told = RequestError("Too many connections are open.", code="too_many_connections", status=503)
    await JSONResponse(told.body(), 503, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)
