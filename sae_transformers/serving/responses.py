"""The Responses endpoint: what transformers' own server makes of its input, and the events that it streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from starlette.exceptions import HTTPException

from ..modeling.tested_releases import NEWEST, OLDEST
from .bodies import Body, wrong
from .completions import event
from .errors import RequestError
from .requests import FREE_TEXT, NO_LOGPROBS, NO_TOOLS, WITHOUT_EFFECT, Asked, Reader, read_messages
from .writing import Writing

NOT_KEPT = "this server keeps no answers; send the whole conversation as input"


def read_response(reader: Reader, body: Body) -> Asked:
    """The request to write that a body of /v1/responses is."""
    handler = _theirs().ResponseHandler
    reader.check_model(body)
    given = {"input": body.take("input"), "instructions": body.text("instructions", None)}
    items = given["input"] if isinstance(given["input"], list) else []
    if not isinstance(given["input"], (str, list)) or not all(isinstance(item, dict) for item in items):
        raise wrong("input", "must be a text or a list of messages", given["input"])
    if any(item.get("type", "message") not in ("message", "input_text") for item in items):
        raise RequestError(f"`input` may hold messages only: {NO_TOOLS}.", "input")
    try:
        messages = read_messages(handler._normalize_input(given))
    except HTTPException as error:
        raise RequestError(f"Bad input. {error.detail}", "input") from error
    body.neutral("text", [{"format": {"type": "text"}}, {}], FREE_TEXT)
    body.neutral("tools", [[]], NO_TOOLS)
    body.neutral("tool_choice", ["none", "auto"], NO_TOOLS)
    body.neutral("top_logprobs", [0], NO_LOGPROBS)
    body.neutral("include", [[]], NO_LOGPROBS)
    for name in ("previous_response_id", "conversation", "prompt"):
        body.neutral(name, [], NOT_KEPT)
    body.neutral("background", [False], NOT_KEPT)
    body.neutral("truncation", ["disabled"], "a conversation that is too long is refused")
    max_tokens = body.whole("max_output_tokens", None, 1)
    prompt = reader.chat_ids(messages)
    steering, stream = reader.steering(body.take("steering")), body.truth("stream", False)
    sampling = reader.sampling(body, [prompt], max_tokens)
    body.ignore(*WITHOUT_EFFECT)
    body.end()
    return Asked((tuple(prompt),), steering, sampling, stream=stream)


class Responses:
    """The forms of /v1/responses."""

    def __init__(self, model: str) -> None:
        self.model = model

    def _defaults(self, writing: Writing) -> dict[str, Any]:
        fixed = {"tools": [], "parallel_tool_calls": False, "tool_choice": "auto"}  # required by the type
        return {
            "id": f"resp_{writing.id}", "created_at": time.time(), "model": self.model, "object": "response", **fixed
        }  # fmt: skip

    async def whole(self, writing: Writing) -> dict[str, Any]:
        *_, last = [part async for part in self._parts(writing)]
        return last["response"]

    async def stream(self, writing: Writing) -> AsyncIterator[str]:
        try:
            async for part in self._parts(writing):
                yield event(part, part["type"])
        except RequestError as error:
            failed = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
            yield event({**failed, "sequence_number": 0}, "error")

    async def _parts(self, writing: Writing) -> AsyncIterator[dict[str, Any]]:
        """The events in order; the last holds the whole response."""
        theirs = _theirs()
        parts: list[dict[str, Any]] = []

        class Builder(theirs._ResponseStreamBuilder):
            def _emit(self, event: Any) -> str:  # as objects, in place of text
                self.seq += 1
                parts.append(event.model_dump(mode="json", exclude_none=True))
                return ""

        builder = Builder(request_id=writing.id, response_defaults=self._defaults(writing))
        builder.start_response()
        builder.start_message()
        finish, tokens = "stop", 0
        while parts:
            yield parts.pop(0)
        async for piece in writing.pieces():
            if piece.text:
                builder.text_delta(piece.text)
            finish, tokens = piece.finish or finish, piece.tokens
            while parts:
                yield parts.pop(0)
        builder.finish_message()
        builder.completed(None)  # what theirs makes of a count fits some releases of `openai` only
        parts[-1]["response"]["usage"] = {
            "input_tokens": writing.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": writing.prompt_tokens + tokens,
        }
        if finish == "length":  # which theirs calls completed
            parts[-1]["type"] = "response.incomplete"
            parts[-1]["response"].update(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
        for part in parts:
            yield part


def _theirs() -> Any:
    """transformers' module of the same endpoint, where it has one as we know it."""
    try:
        from transformers.cli.serving import response
    except (ImportError, NameError) as error:  # a package that it needs, or a name that it lacks without one
        raise _unknown(str(error)) from error
    needed = ("ResponseHandler", "_ResponseStreamBuilder")
    if missing := [name for name in needed if not hasattr(response, name)]:
        raise _unknown(f"no {missing[0]}")
    return response


def _unknown(why: str) -> RequestError:
    return RequestError(
        f"/v1/responses is built on the server of transformers {OLDEST} to {NEWEST}. "
        f"Received: {version('transformers')} ({why}). Use /v1/chat/completions.",
        code="unsupported_version",
        status=501,
    )
