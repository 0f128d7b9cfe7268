"""Answers of the endpoints for chat and text completions, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from .errors import RequestError
from .writing import Writing

DONE = "data: [DONE]\n\n"


def event(value: dict[str, Any], kind: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {kind}\n" if kind else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Completions:
    """The forms of one endpoint. chat: messages, else plain text."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.model, self.chat = model, chat
        self.kind = "chat.completion" if chat else "text_completion"

    def _head(self, writing: Writing, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{writing.id}", "object": kind, "created": writing.created, "model": self.model}

    async def whole(self, writing: Writing) -> dict[str, Any]:
        choices, tokens = [], 0
        for number, answer in enumerate(await writing.whole()):
            tokens += answer.tokens
            said: dict[str, Any] = {"text": answer.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append({"index": number, **said, "finish_reason": answer.finish, "logprobs": None})
        return {
            **self._head(writing, self.kind),
            "choices": choices,
            "usage": usage(writing.prompt_tokens, tokens),
        }

    async def stream(self, writing: Writing) -> AsyncIterator[str]:
        """Server-sent events; the last is `[DONE]`, or an error."""
        head = self._head(writing, "chat.completion.chunk" if self.chat else self.kind)
        if writing.asked.include_usage:
            head["usage"] = None
        tokens: dict[int, int] = {}
        try:
            if self.chat:
                for answer in writing.answers:
                    yield event(self._chunk(head, answer.number, {"role": "assistant", "content": ""}, None))
            async for piece in writing.pieces():
                tokens[piece.number] = piece.tokens
                if piece.text:
                    said: Any = {"content": piece.text} if self.chat else piece.text
                    yield event(self._chunk(head, piece.number, said, None))
                if piece.finish:
                    yield event(self._chunk(head, piece.number, {} if self.chat else "", piece.finish))
            if writing.asked.include_usage:
                yield event({**head, "choices": [], "usage": usage(writing.prompt_tokens, sum(tokens.values()))})
            yield DONE
        except RequestError as error:
            yield event(error.body())

    def _chunk(self, head: dict[str, Any], number: int, said: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": number, "delta" if self.chat else "text": said, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice]}
