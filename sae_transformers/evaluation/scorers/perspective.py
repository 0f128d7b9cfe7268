"""Toxicity by Perspective (https://developers.perspectiveapi.com), a service of Jigsaw that closes at the end of 2026.

Several third-party pages give 2026-12-31 as its last day and February 2026 as the last for new keys. What is measured
with it cannot be repeated afterwards: prefer a classifier whose weights are kept. Servers with the same interface take
its place by `endpoint`.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt
from torch import Tensor

from ...latents.safe_texts import is_loopback

ENDPOINT = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
MOST_BYTES = 20_480  # of a text, by the service's documentation
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
GONE = (404, 410, 501)
LONGEST_WAIT = 60.0


class PerspectiveGone(OSError):
    """The service does not exist any more."""


class PerspectiveRefused(OSError):
    """The service does not answer as it should: a key that it does not take, a quota, a text."""


class _TryAgain(Exception):
    """What may pass. wait: seconds that the service asks for, if it does."""

    def __init__(self, told: str, wait: float | None = None) -> None:
        super().__init__(told)
        self.wait = wait


class PerspectiveScorer:
    """Perspective's summary score of one attribute, a probability.

    A text without a word is not sent and scores 0.0, as in SCAR. Texts longer than the service takes (20,480 bytes)
    are cut. Equal texts are sent once. The service is asked not to keep them. The key is sent in a header and stands
    in no message.

    Args:
        attribute: such as TOXICITY, SEVERE_TOXICITY, INSULT.
        key_env: environment variable with the key.
        endpoint: of the service, or of another with its interface; https, or a loopback address.
        language: of the texts.
        requests_per_second: sent at most; Perspective gives 1 unless more was asked for.
        max_attempts: of a text, before it is given up.
        backoff: seconds of the first wait after a failure; waits double, up to a minute.
        timeout: seconds of one attempt.

    Raises:
        ValueError: the environment variable is not set, an endpoint that would send the key in the clear, or a number
            that is not above 0.
    """

    def __init__(
        self,
        attribute: str = "TOXICITY",
        *,
        key_env: str = "PERSPECTIVE_API_KEY",
        endpoint: str = ENDPOINT,
        language: str = "en",
        requests_per_second: float = 1.0,
        max_attempts: int = 5,
        backoff: float = 1.0,
        timeout: float = 30.0,
    ) -> None:
        for name, value in (
            ("requests_per_second", requests_per_second), ("max_attempts", max_attempts), ("timeout", timeout),
        ):  # fmt: skip
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0. Received: {name}={value!r}.")
        url = urllib.parse.urlsplit(endpoint)
        if url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.hostname)):
            raise ValueError(f"`endpoint` must be https, or a loopback address. Received: endpoint={endpoint!r}.")
        key = os.environ.get(key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"Perspective needs a key, one word of ASCII, in the environment variable {key_env}. "
                f"Received: {'another' if key else 'none'}."
            )
        self.attribute, self.endpoint, self.language = attribute, endpoint, language
        self.key_env, self.timeout = key_env, timeout
        self._key, self._pause, self._next = key, 1 / requests_per_second, 0.0
        self._attempts, self._backoff = max_attempts, backoff
        self._lock = threading.Lock()
        proxies = [urllib.request.ProxyHandler({})] if is_loopback(url.hostname) else []  # the environment's, or none
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def __repr__(self) -> str:
        return f"PerspectiveScorer({self.attribute!r}, endpoint={self.endpoint!r})"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n,) float64 in [0, 1].

        Raises:
            PerspectiveGone: the service was closed.
            PerspectiveRefused: it refuses, or does not answer after all attempts.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of texts. Received: one text.")
        known = {text: 0.0 if not text.strip() else self._score(text) for text in dict.fromkeys(texts)}
        return torch.tensor([known[text] for text in texts], dtype=torch.float64)

    def _score(self, text: str) -> float:
        def wait(state: Any) -> float:
            asked = getattr(state.outcome.exception(), "wait", None)
            return min(LONGEST_WAIT, self._backoff * 2 ** (state.attempt_number - 1) if asked is None else asked)

        tries = Retrying(
            stop=stop_after_attempt(self._attempts), wait=wait, retry=retry_if_exception_type(_TryAgain), reraise=True
        )
        try:
            return tries(self._send, text.encode()[:MOST_BYTES].decode(errors="ignore"))
        except _TryAgain as error:
            raise PerspectiveRefused(
                f"{self.endpoint} did not answer in {self._attempts} attempts: {error}. The service closes at the end "
                f"of 2026; another scorer, such as 'profanity' or 'classifier:ID#label', does not need it."
            ) from None

    def _send(self, text: str) -> float:
        self._wait_for_turn()
        body = {
            "comment": {"text": text}, "languages": [self.language], "requestedAttributes": {self.attribute: {}},
            "doNotStore": True,
        }  # fmt: skip
        request = urllib.request.Request(
            self.endpoint,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "X-Goog-Api-Key": self._key},
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                found = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error.code, error.headers.get("Retry-After"), error.read()) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke
            raise _TryAgain(self._hidden(f"{type(error).__name__}: {error}")) from None
        return self._read(found)

    def _read(self, body: bytes) -> float:
        try:
            value = json.loads(body)["attributeScores"][self.attribute]["summaryScore"]["value"]
        except (ValueError, KeyError, TypeError):
            value = None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise PerspectiveRefused(
                f"{self.endpoint} answered without a score of {self.attribute}: is it Perspective's interface?"
            )
        return float(value)

    def _failure(self, status: int, retry_after: str | None, body: bytes) -> Exception:
        told = self._hidden(_message(body))
        if status in GONE:
            return PerspectiveGone(
                f"Perspective is gone: {self.endpoint} answered {status} {told}. It was to close on 2026-12-31. Use "
                f"another scorer, such as 'profanity' or 'classifier:ID#label'; their numbers are not comparable."
            )
        if status in TRY_AGAIN:
            wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
            return _TryAgain(f"{status} {told}", wait)
        return PerspectiveRefused(
            f"{self.endpoint} refused with {status} {told}. The key comes from the environment variable "
            f"{self.key_env}; no new ones have been given since 2026."
        )

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._pause
        time.sleep(turn - now)

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "(key)")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the endpoint and nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _message(body: bytes) -> str:
    """What a Google service says of an error, shortened."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return ""
