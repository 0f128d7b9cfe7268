"""A client of any server that speaks OpenAI's chat completions: retries that end, a cache, a budget.

    with LLMClient("gpt-4o-mini", cache="answers", prices=(0.15, 0.60), max_cost=10) as client:
        print(client.estimate(requests))
        answers = client.complete_many(requests)

The key comes from the environment and goes to the server that it was named for, nowhere else: OpenAI's own is never
sent to another server, nothing goes to another machine in the clear, and no redirect is followed.
"""

from __future__ import annotations

import base64
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...latents.safe_texts import is_loopback
from .budget import Budget, TokenCount
from .protocol import (
    MAY_HAVE_COST,
    NEVER_SENT,
    NotSent,
    Rejected,
    ServiceRefused,
    TryAgain,
    error_of,
    offending_field,
    read_completion,
    without_login,
)
from .requests import GAVE_UP, NOT_DONE, REJECTED, Answer, Chat, ChatRequest
from .usage import Account, Estimate, Tokens

OPENAI_URL = "https://api.openai.com/v1"


def is_openai(base_url: str) -> bool:
    """Whether an address is of OpenAI's own service, in any of its regions."""
    parts = urlsplit(base_url)
    return parts.scheme == "https" and f".{parts.hostname}".endswith(".api.openai.com")


def _without_openai_headers(request: Any) -> None:
    """Take out what the client underneath reads from the environment and adds, whatever the server."""
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
    custom = [line.partition(":")[0].strip() for line in lines]
    for name in ("OpenAI-Organization", "OpenAI-Project", *custom):
        if name and name.lower() != "authorization":
            request.headers.pop(name, None)


class LLMClient(Chat):
    """Sends requests to a server with OpenAI's interface.

    Args:
        model: its name at the server.
        base_url: of the server; None for $OPENAI_BASE_URL, or OpenAI itself. `user:password@` in it is sent in the
            header, as basic authentication, and kept out of every text. Plain http is for this machine alone.
        api_key_env: environment variable with the key, which is sent to `base_url`. None for OPENAI_API_KEY at OpenAI
            itself, and for no key at another server.
        concurrency: requests at a time.
        max_tokens_total, max_cost: what this client may spend; answers in the cache cost nothing.
        prices: of 1,000,000 tokens of prompts and of answers.
        timeout: seconds of one attempt.
        max_attempts: of a request, before it is given up.
        cache: folder of the answers; a run that was cut off goes on from there. None forgets them.
        tokenizer: with `encode(text)`, for exact counts; else the estimate takes three characters for a token, and
            the limits one byte.
        backoff: seconds of the first wait and of the longest. Waits double, and are made random.
        patience: the longest wait, in seconds, that a server may ask for with Retry-After.
        stop_after_failures: given up in a row, after which no more are sent: the server is gone.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str | None = None,
        concurrency: int = 8,
        max_tokens_total: int | None = None,
        max_cost: float | None = None,
        prices: tuple[float, float] | None = None,
        timeout: float = 120.0,
        max_attempts: int = 6,
        cache: str | Path | None = None,
        *,
        tokenizer: Any = None,
        backoff: tuple[float, float] = (1.0, 60.0),
        patience: float = 300.0,
        stop_after_failures: int = 20,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("max_attempts", max_attempts), ("timeout", timeout)):
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0. Received: {name}={value!r}.")
        self._base_url, self._login = without_login(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
        super().__init__(model, self._base_url, cache)
        self._of_openai = is_openai(self._base_url)
        self.api_key_env = api_key_env or ("OPENAI_API_KEY" if self._of_openai else "")
        self.concurrency, self.max_attempts = concurrency, max_attempts
        self.budget = Budget(max_tokens_total, max_cost, prices)
        self.count = TokenCount(tokenizer)
        self._timeout, self._backoff, self._patience = timeout, backoff, patience
        self._stop_after_failures = stop_after_failures
        self._dropped: frozenset[str] = frozenset()  # fields that the server does not know
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._failures = 0
        self._resume_at = 0.0
        self._why_stopped = "stopped"
        self._secrets: tuple[str, ...] = self._login[1:]
        self._made: Any = None

    def __repr__(self) -> str:
        return f"LLMClient(model={self.model!r}, base_url={self._base_url!r})"

    @property
    def account(self) -> Account:
        """What was used so far."""
        return self.budget.account()

    @property
    def openai(self) -> Any:
        """The `openai.OpenAI` underneath, made at first use."""
        with self._lock:
            if self._made is None:
                from openai import DefaultHttpxClient, OpenAI

                key = os.environ.get(self.api_key_env, "").strip()
                if not key and self._of_openai:
                    raise ValueError(f"OpenAI needs a key: set the environment variable {self.api_key_env}.")
                if not key.isascii() or not key.isprintable() or " " in key:  # errors of the client would show it
                    raise ValueError(
                        f"The key in the environment variable {self.api_key_env} is not one word of ASCII."
                    )
                headers = {"Authorization": f"Bearer {key or 'none'}"}
                if self._login:
                    encoded = base64.b64encode(":".join(self._login).encode()).decode()
                    headers["Authorization"] = f"Basic {encoded}"
                    self._secrets += (encoded,)
                self._secrets += (key,)
                self._made = OpenAI(
                    api_key=key or "none",
                    base_url=self._base_url,
                    timeout=self._timeout,
                    max_retries=0,
                    default_headers=headers,
                    http_client=DefaultHttpxClient(
                        follow_redirects=False,
                        trust_env=not is_loopback(urlsplit(self._base_url).hostname),  # else through a proxy
                        event_hooks={} if self._of_openai else {"request": [_without_openai_headers]},
                    ),
                )
            return self._made

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """What the requests would cost at most, less what is in the cache. Sends nothing, needs no key."""
        return self.budget.estimate(self.missing(requests).values(), self.count, len(requests))

    def close(self) -> None:
        """Close the connection and the cache's file; leaving a `with` block does it."""
        super().close()
        if self._made is not None:
            self._made.close()
            self._made = None

    def _send(self, requests: Mapping[str, ChatRequest]) -> Iterator[tuple[str, Answer]]:
        if not requests:
            return
        _ = self.openai  # a missing key is told here, not by each thread
        self._why_stopped = "stopped"
        self._stopping.clear()
        self.budget.start()
        self._failures = 0
        refused: ServiceRefused | None = None
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="llm")
        try:
            running = {pool.submit(self._answer, key, request): key for key, request in requests.items()}
            for done in as_completed(running):
                error = done.exception()
                if isinstance(error, ServiceRefused):
                    refused = refused or error
                elif error is not None:
                    raise error
                else:
                    yield running[done], done.result()
        finally:  # what runs is paid for, so it is waited for and kept, whatever happened here
            self._stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if refused is not None:
            raise refused

    def _answer(self, key: str, request: ChatRequest) -> Answer:
        """One request, in a thread of its own, until it has an answer or never will."""
        from tenacity import RetryError, Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt

        retrying = Retrying(
            stop=stop_after_attempt(self.max_attempts),
            retry=retry_if_exception_type(TryAgain),
            wait=self._wait,
            sleep=sleep_using_event(self._stopping),
        )
        last = ""
        try:
            answer = retrying(self._attempt, request, frozenset())
        except NotSent as reason:
            return Answer(failure=NOT_DONE, detail=str(reason))
        except Rejected as reason:
            return Answer(failure=REJECTED, detail=str(reason))
        except ServiceRefused:
            self._stopping.set()
            raise
        except RetryError as error:
            last = str(error.last_attempt.exception())
        else:
            self.cache.put(key, answer)
            self._failures = 0
            return answer
        with self._lock:
            self._failures += 1
            if self._failures >= self._stop_after_failures:
                self._stop(f"stopped after {self._failures} failures in a row")
        return Answer(failure=GAVE_UP, detail=f"after {self.max_attempts} attempts: {last}")

    def _stop(self, why: str) -> None:
        self._why_stopped = why
        self._stopping.set()

    def _wait(self, state: Any) -> float:
        """Seconds before the next attempt: between half and all of a wait that doubles, or what the server asked."""
        first, longest = self._backoff
        wait = min(longest, first * 2 ** (state.attempt_number - 1)) * random.uniform(0.5, 1.0)
        asked = getattr(state.outcome.exception(), "retry_after_s", None)
        return wait if asked is None else asked + random.uniform(0, 0.1) * max(wait, asked)

    def adapted(self, body: Mapping[str, Any], dropped: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The body without the fields that this server has rejected."""
        kept = {name: value for name, value in body.items() if name not in self._dropped | dropped}
        if "max_tokens" in body and "max_tokens" not in kept:
            kept["max_completion_tokens"] = body["max_tokens"]
        return kept

    def _attempt(self, request: ChatRequest, dropped: frozenset[str]) -> Answer:
        body = self.adapted(request.body(self.model), dropped)
        try:
            return self._post(request, body)
        except Rejected as reason:
            offending = offending_field(body, str(reason))
            if offending is None:
                raise
        answer = self._attempt(request, dropped | {offending})
        with self._lock:
            self._dropped |= {offending}  # it was that field: the next requests go without it
        return answer

    def _post(self, request: ChatRequest, body: dict[str, Any]) -> Answer:
        """One HTTP request, within the budget."""
        if (pause := self._resume_at - time.monotonic()) > 0:
            self._stopping.wait(pause)
        if self._stopping.is_set():
            raise NotSent(self._why_stopped)
        reserved = self.budget.reserve(Tokens(self.count.bound(request), request.max_tokens))
        if reserved is None:
            raise NotSent("the budget is used up")
        if self._stopping.is_set():  # while it waited
            self.budget.settle(reserved, Tokens(0, 0), sent=False)
            raise NotSent(self._why_stopped)
        used: Tokens | None = None
        try:
            answer, used, failure = self._exchange(body)
        finally:
            self.budget.settle(reserved, used)
        if answer is not None:
            return answer
        if isinstance(failure, TryAgain) and failure.retry_after_s is not None:
            if failure.retry_after_s > self._patience:
                self._stop(f"{failure}, and asks to wait {failure.retry_after_s:,.0f} s")
                raise NotSent(self._why_stopped)
            with self._lock:  # the others wait too
                self._resume_at = max(self._resume_at, time.monotonic() + failure.retry_after_s)
        raise failure

    def _exchange(self, body: dict[str, Any]) -> tuple[Answer | None, Tokens | None, Exception]:
        """Send, and read the answer, the tokens it used (None: unknown) and what went wrong."""
        import openai

        named = {name: body.pop(name) for name in ("model", "messages")}
        try:
            raw = self.openai.chat.completions.with_raw_response.create(**named, extra_body=body)
        except openai.APIStatusError as error:
            status, text = error.response.status_code, self.clean(error.response.text)
            names = {"key": self.api_key_env, "model": self.model, "url": self._base_url}
            used = None if status in MAY_HAVE_COST else Tokens(0, 0)
            return None, used, error_of(status, error.response.headers, text, names)
        except openai.APIConnectionError as error:  # a timeout is one too
            cause = type(error.__cause__).__name__
            used = Tokens(0, 0) if cause in NEVER_SENT else None
            return None, used, TryAgain(self.clean(self._unreached(error)))
        answer, used, problem = read_completion(self.clean(raw.http_response.text))
        return answer, used, TryAgain(problem)

    def with_openai(self, action: Callable[[Any], Any]) -> Any:
        """What `action(self.openai)` returns; errors as `ServiceRefused`, without what they hold of the request."""
        import openai

        try:
            return action(self.openai)
        except openai.APIStatusError as error:
            message = f"the server answered {error.response.status_code}: {error.response.text[:300]}"
        except openai.APIConnectionError as error:
            message = self._unreached(error)
        raise ServiceRefused(self.clean(message))  # here, where the error with the request in it is gone

    def _unreached(self, error: Exception) -> str:
        return f"no answer from {self._base_url}: {error} ({type(error.__cause__).__name__})"

    def clean(self, text: str) -> str:
        """The text without the key and the password."""
        for secret in self._secrets:
            if len(secret) >= 8:  # shorter ones, such as "none", hide nothing and stand in ordinary words
                text = text.replace(secret, "[secret]")
        return text
