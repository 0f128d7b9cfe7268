"""The web application: routes, the key, errors in OpenAI's form, and clients that go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .bodies import Body
from .completions import Completions
from .detecting import Detector, describe_saes, find_features, read_detection
from .engine import MAX_WAITING, Engine
from .errors import RequestError
from .intake import Intake
from .limits import ServeLimits
from .requests import Asked, Reader
from .responses import Responses, read_response
from .web.description import Description, errors
from .web.guards import HostCheck, KeyCheck
from .web.metrics import Metrics
from .web.record import Recorder, RequestRecord, Traffic, refusal
from .writing import Writing


def build_app(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    aliases: tuple[str, ...] = (),
    max_concurrent: int = 32,
    max_tokens: int = 512,
    api_key: str | None = None,
    limits: ServeLimits | None = None,
) -> FastAPI:
    """A server of one model; its engine is `app.state.engine` and runs as long as the application does.

    Args:
        model: a `SaeForCausalLM` in eval mode.
        tokenizer: the model's.
        name: of the model, as requests tell it. aliases: other names for it.
        max_concurrent: answers that are written together; the others wait.
        max_tokens: of an answer, where a request does not say.
        api_key: that requests to /v1 must bring as a bearer token; None asks for none.
        limits: what clients are given.

    Raises:
        ValueError: `max_concurrent` or `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"`max_tokens` must be at least 1. Received: max_tokens={max_tokens!r}.")
    limits = limits or ServeLimits()
    cache_bytes = None if limits.cache_gib is None else int(limits.cache_gib * 2**30)
    engine = Engine(model, tokenizer, max_concurrent, cache_bytes)
    reader = Reader(model, tokenizer, (name, *aliases), max_tokens)
    detector = Detector(model, tokenizer, name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(engine.stop)

    intake, traffic = Intake(limits), Traffic()

    def readiness() -> str:
        """`ready`, or why no more should be sent here."""
        if not engine.is_alive or traffic.draining:
            return "draining" if engine.is_alive else "stopped"
        if max(engine.blocked_s, intake.blocked_s) > limits.blocked_after_s:
            return "blocked"
        return "full" if len(engine.waiting) >= MAX_WAITING else "ready"

    metrics = Metrics(engine, lambda: model.plans_kept, lambda: readiness() == "ready", traffic)
    traffic.ended = metrics.count
    description = Description(reader)
    app = FastAPI(title="sae-transformers", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.traffic, app.state.limits = engine, traffic, limits
    if api_key is not None:
        app.add_middleware(KeyCheck, key=api_key)
    app.add_middleware(HostCheck, allowed=limits.allowed_host or ())
    app.add_middleware(Recorder, traffic=traffic)  # what is added last is first: it sees what the others refuse

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return refusal(error, request.scope)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        told = RequestError(f"{error.detail}: {request.method} {request.url.path}", status=error.status_code)
        answer = refusal(told, request.scope)
        answer.headers.update(error.headers or {})
        return answer

    async def written(request: Request, read: Callable[[Body], Asked], form: Completions | Responses) -> Response:
        """Read a request, write its answers and give them in the endpoint's form."""
        raw = await intake.receive(request)
        asked = await unless_gone(request, intake.read(raw, read))
        writing = Writing(asked, engine, tokenizer, RequestRecord.of(request.scope))
        if asked.stream:
            return Events(form.stream(writing), writing)
        try:
            return JSONResponse(await unless_gone(request, form.whole(writing)))
        finally:
            writing.close()

    @app.post("/v1/chat/completions", responses=errors(), openapi_extra=description.chat())
    async def chat(request: Request) -> Response:
        return await written(request, reader.chat, Completions(name, chat=True))

    @app.post("/v1/completions", responses=errors(), openapi_extra=description.completion())
    async def completion(request: Request) -> Response:
        return await written(request, reader.completion, Completions(name, chat=False))

    @app.post("/v1/responses", responses=errors(), openapi_extra=description.response())
    async def response(request: Request) -> Response:
        return await written(request, lambda body: read_response(reader, body), Responses(name))

    @app.post("/v1/detect", responses=errors(), openapi_extra=description.detection())
    async def detect(request: Request) -> Response:
        raw = await intake.receive(request)
        asked = await unless_gone(request, intake.read(raw, lambda body: read_detection(reader, body)))
        given_up = threading.Event()
        try:
            found = await unless_gone(request, intake.detect(lambda: detector.detect(asked, given_up)))
        finally:
            given_up.set()
        RequestRecord.of(request.scope).prompt_tokens = found["usage"]["prompt_tokens"]
        return JSONResponse(found)

    @app.get("/v1/features", responses=errors())
    def features(
        query: str | None = None, k: str = "10"
    ) -> dict[str, Any]:  # in a thread: annotations may be read now
        saes = model.config.sae_configs
        return describe_saes(saes) if query is None else find_features(saes, query, k)

    entry = {"id": name, "object": "model", "created": 0, "owned_by": "sae-transformers"}
    entry["steering"] = reader.default_steering.to_dict() if reader.default_steering else None

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        reader.check_model(Body({"model": asked}))
        return entry

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the process is of use at all: a restart would help where it is not."""
        alive = engine.is_alive
        counts = {"running": len(engine.running), "waiting": len(engine.waiting)}
        return JSONResponse({"status": "ok" if alive else "stopped", **counts}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether more may be sent here now."""
        state = readiness()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class Events(StreamingResponse):
    """Server-sent events of answers, which end when the client goes away, however early."""

    def __init__(self, events: AsyncIterator[str], writing: Writing) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._writing = writing

    async def __call__(self, *call: Any) -> None:
        try:
            await super().__call__(*call)
        finally:
            self._writing.close()


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`; given up as soon as the client closes its connection.

    Raises:
        RequestError: the client is gone. Nobody reads it.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError("The client closed the connection.", code="client_gone", status=499)
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
