"""From a request to the engine and back: the pieces of its answers, in the event loop of the server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from .engine import Answer, Engine
from .requests import Asked
from .web.record import RequestRecord


@dataclass
class Written:
    """One answer, written whole. finish: `stop` or `length`. tokens: of the answer."""

    text: str
    finish: str
    tokens: int


@dataclass
class Piece:
    """What an answer grew by. number: of the answer. finish: None until its end."""

    number: int
    text: str
    finish: str | None
    tokens: int


@dataclass
class Writing:
    """The answers to one request, from the moment that they are submitted. Close it, however it ends.

    record: of the request, which is told the tokens and what failed. id, created: of the answer, as it tells them.
    """

    asked: Asked
    engine: Engine
    tokenizer: Any
    record: RequestRecord
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Answer, str, str | None]] = asyncio.Queue()
        asked = self.asked
        self.answers = [
            Answer(prompt, asked.steering, asked.sampling, self.tokenizer, self._report, place * asked.n + number)
            for place, prompt in enumerate(asked.prompts)
            for number in range(asked.n)
        ]
        self._held: dict[int, list[str]] = {answer.number: [] for answer in self.answers}
        self.engine.submit(self.answers)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.asked.prompts)

    def _report(self, answer: Answer, piece: str, finish: str | None) -> None:
        """In the engine's thread. What is not streamed goes to the event loop once."""
        if not self.asked.stream:
            self._held[answer.number].append(piece)
            if finish is None:
                return
            piece = "".join(self._held[answer.number])
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (answer, piece, finish))
        except RuntimeError:  # the loop is closed
            answer.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all answers as they come, until the last has ended.

        Raises:
            RequestError: an answer failed.
        """
        left = len(self.answers)
        while left:
            answer, text, finish = await self._queue.get()
            if answer.error is not None:
                self.record.failed(answer.error)
                raise answer.error
            left -= finish is not None
            yield Piece(answer.number, text, finish, len(answer.tokens))

    async def whole(self) -> list[Written]:
        """All answers, in order."""
        found = {}
        async for piece in self.pieces():
            found[piece.number] = Written(piece.text, piece.finish or "stop", piece.tokens)
        return [found[number] for number in sorted(found)]

    def close(self) -> None:
        """Nobody waits for the answers any more: those that are unfinished are dropped."""
        for answer in self.answers:
            answer.cancel()
        self.record.prompt_tokens = self.prompt_tokens
        self.record.written_tokens = sum(len(answer.tokens) for answer in self.answers)
