"""The record of each request: its id, its line in the log, its place in the counts; and whether more are taken."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from ..errors import RequestError

logger = logging.getLogger(__name__)

RECORD = "sae_transformers.record"  # its key in the scope of a request
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass
class RequestRecord:
    """What is remembered of a request: no texts, no keys.

    id: the client's, where it is a word of at most 128 letters, digits and `._:-`; else a new one. endpoint: its
    route, `other` where there is none. status: of HTTP, 0 where the client was gone before. prompt_tokens,
    written_tokens: of all its texts and answers. error: the code that it was told, also in the middle of a stream.
    """

    id: str
    method: str
    client: str
    endpoint: str = "other"
    status: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    error: str | None = None
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @classmethod
    def of(cls, scope: Any) -> RequestRecord:
        """The record of the request that `scope` is of."""
        return scope[RECORD]

    def failed(self, error: RequestError) -> None:
        self.error = error.code or ("bad_request" if error.status < 500 else "failed")

    def line(self) -> str:
        return (
            f"request={self.id} client={self.client} {self.method} {self.endpoint} status={self.status} "
            f"prompt_tokens={self.prompt_tokens} written_tokens={self.written_tokens} seconds={self.seconds:.3f} "
            f"error={self.error or '-'}"
        )


class Recorder:
    """Gives each request its record, tells its id in `X-Request-ID`, and logs and counts it when it has ended.

    What goes wrong in the application ends here as HTTP 500, with its traceback in the log under the request's id.

    Args:
        traffic: of the application.
    """

    def __init__(self, app: Any, traffic: Traffic) -> None:
        self.app, self.traffic = app, traffic

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        record = scope[RECORD] = RequestRecord(
            given if SANE_ID.fullmatch(given) else secrets.token_hex(12),
            scope["method"] if scope["method"] in METHODS else "other",
            (scope.get("client") or ("-",))[0],
        )

        async def answered(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        works = record.method == "POST"
        self.traffic.at_work += works
        try:
            if works and self.traffic.draining:
                told = RequestError("The server is stopping.", code="stopping", status=503)
                await refuse(told, scope, receive, answered)
            else:
                await self._run(record, scope, receive, answered)
        finally:
            self.traffic.at_work -= works
            record.endpoint = getattr(scope.get("route"), "path", "other")
            record.seconds = time.monotonic() - record.begun
            logger.info(record.line())
            self.traffic.ended(record)

    async def _run(self, record: RequestRecord, scope: Any, receive: Any, answered: Any) -> None:
        try:
            await self.app(scope, receive, answered)
        except Exception:
            logger.exception("The server failed on request %s", record.id)
            if record.status:
                raise  # in the middle of an answer: the connection is closed
            told = RequestError("The server failed; its log says why.", code="failed", status=500)
            await refuse(told, scope, receive, answered)


@dataclass
class Traffic:
    """Requests of an application as a whole.

    at_work: requests with a body whose answers have not ended. draining: whether no more of them are taken.
    connections: how many are open. ended: is called with the record of each request that has ended.
    """

    at_work: int = 0
    draining: bool = False
    connections: Callable[[], int] = lambda: 0
    ended: Callable[[RequestRecord], object] = lambda record: None


async def refuse(error: RequestError, scope: Any, receive: Any, send: Any) -> None:
    """Answer a request with an error, in place of the application."""
    await refusal(error, scope)(scope, receive, send)


def refusal(error: RequestError, scope: Any) -> JSONResponse:
    """The answer to a request that is not served, which its record is told too."""
    if RECORD in scope:
        RequestRecord.of(scope).failed(error)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 408:  # the rest of the body is not waited for
        headers["Connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)
