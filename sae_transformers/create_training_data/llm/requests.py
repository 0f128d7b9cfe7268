"""Requests to a chat model, their answers, and the file that keeps every answer.

A request is known by a hash of all that decides its answer, so an answer is asked for, and paid for, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .usage import Account, Estimate

REFUSAL, EMPTY, REJECTED, GAVE_UP, NOT_DONE = "refusal", "empty", "rejected", "gave up", "not done"
KEPT = (None, REFUSAL, EMPTY)  # what the model said itself: asking again would cost again


@dataclass(frozen=True)
class ChatRequest:
    """What is sent to a chat model.

    messages: each with `role` and `content`. max_tokens: of the answer. temperature, top_p, seed: None leaves the
    server's own. response_format: as in OpenAI's interface, for example a JSON schema. extra: further fields.
    """

    messages: Sequence[Mapping[str, str]]
    max_tokens: int = 512
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = 42
    response_format: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        """The JSON object of OpenAI's chat completions."""
        body = {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "max_tokens": self.max_tokens,
        }
        for name in ("temperature", "top_p", "seed", "response_format"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        return {**body, **self.extra}

    def key(self, model: str, endpoint: str) -> str:
        """64 hexadecimal digits that depend on the whole request, the model and who answers."""
        text = json.dumps([endpoint, self.body(model)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """A model's answer, or why there is none.

    text: of the answer; None if it failed. failure: "refusal", "empty" (no text), "rejected" (the server calls the
    request wrong), "gave up" (after the last attempt) or "not done" (never asked); None if there is a text.
    detail: of the failure. prompt_tokens, completion_tokens: as the server counted them.
    """

    text: str | None = None
    failure: str | None = None
    detail: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.failure is None


class AnswerCache:
    """Answers by the key of their request: one file, `answers.jsonl`, to which each answer is added as it comes.

    A line is in the file before anyone is told of its answer. A process that is killed leaves at most half a line,
    which the next one skips. Several processes may add to one file; each sees what was there when it started.

    Args:
        folder: of the file, made if it is missing. None keeps the answers in memory only.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.path = None if folder is None else Path(folder) / "answers.jsonl"
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._file: int | None = None
        self._closing: Callable[[], object] | None = None  # also when nobody calls `close`
        if self.path is not None and self.path.exists():
            from ...modeling.plain_files import check_plain  # with torch, which the settings of verbs do without

            with check_plain(self.path).open("rb") as file:
                for line in file:
                    self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            key = record.pop("key")
            self._answers[key] = Answer(**record)
        except (ValueError, TypeError, KeyError, AttributeError):
            pass  # half a line of a killed process, or not ours

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer. Failures that another attempt may cure are not kept."""
        if answer.failure not in KEPT:
            return
        line = json.dumps({"key": key, **asdict(answer)}).encode() + b"\n"
        with self._lock:
            self._answers[key] = answer
            if self.path is None:
                return
            if self._file is None:
                self._file = self._open(self.path)
                self._closing = weakref.finalize(self, os.close, self._file)
            while line:  # one call, unless the disk is full
                line = line[os.write(self._file, line) :]

    @staticmethod
    def _open(path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")  # after half a line
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Close the file; `put` opens it again."""
        with self._lock:
            if self._closing is not None:
                self._closing()
            self._file = self._closing = None


class Chat(ABC):
    """A model that answers requests, each once.

    Args:
        model: its name.
        endpoint: who answers, without secrets; with the model's name it tells answers of different models apart.
        cache: folder of the answers; None forgets them at the end.
    """

    def __init__(self, model: str, endpoint: str, cache: str | Path | None) -> None:
        self.model, self.endpoint = model, endpoint
        self.cache = AnswerCache(cache)
        self._one_call = threading.Lock()

    def key(self, request: ChatRequest) -> str:
        return request.key(self.model, self.endpoint)

    def missing(self, requests: Sequence[ChatRequest]) -> dict[str, ChatRequest]:
        """The requests that have no answer yet, each once."""
        keyed = {self.key(request): request for request in requests}
        return {key: request for key, request in keyed.items() if key not in self.cache}

    def complete_many(
        self, requests: Sequence[ChatRequest], progress: bool | Callable[[int, int], object] = True
    ) -> list[Answer]:
        """Answers in the order of the requests. Equal requests are sent once; answered ones are not sent again.

        Args:
            progress: a bar on stderr, none, or a function that is called with (done, total) after each answer.
        """
        with self._one_call:  # so that two threads with the same request do not both send it
            keys = [self.key(request) for request in requests]
            missing = self.missing(requests)
            found: dict[str, Answer] = {}
            total = len(set(keys))
            report = progress if callable(progress) else None
            hidden = not progress or report is not None
            with tqdm(total=total, initial=total - len(missing), disable=hidden, desc=self.model) as bar:
                for key, answer in self._send(missing):
                    found[key] = answer
                    bar.update()
                    if report is not None:
                        report(total - len(missing) + len(found), total)
            return [found.get(key) or self.cache[key] for key in keys]

    @property
    @abstractmethod
    def account(self) -> Account:
        """What was used so far."""

    @abstractmethod
    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """What requests would use at most, without those that are answered."""

    @abstractmethod
    def _send(self, requests: Mapping[str, ChatRequest]) -> Iterator[tuple[str, Answer]]:
        """Answer each request and put the answer into the cache at once."""

    def close(self) -> None:
        self.cache.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
