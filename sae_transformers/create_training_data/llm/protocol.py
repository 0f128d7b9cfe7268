"""What a server with OpenAI's chat completions says: answers, and what each kind of error asks the client to do."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ...latents.safe_texts import is_loopback
from .requests import EMPTY, REFUSAL, Answer
from .usage import Tokens

STOP = {
    401: "the key is wrong or missing: set the environment variable {key}",
    402: "the account has no money left",
    403: "the key may not use this model or this server",
    404: "no such model or address: check model={model!r} and base_url={url!r}",
}
NO_KEY = "it asks for a key: name the environment variable of the one for this server by `api_key_env`"
TRY_AGAIN = (408, 409, 425, 429)
MAY_HAVE_COST = (408, 504, 524)  # the model may have worked while a gateway stopped waiting
QUOTA = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
NEVER_SENT = ("ConnectError", "ConnectTimeout")
OPTIONAL = ("temperature", "top_p", "seed")


class ServiceRefused(RuntimeError):
    """The server refuses every request: a wrong key, an unknown model, no money. What was answered is in the cache."""


class TryAgain(Exception):
    """This attempt failed, another may not. retry_after_s: as the server asked; None if it did not."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rejected(Exception):
    """The server calls this request wrong."""


class NotSent(Exception):
    """This request will not be sent."""


def read_completion(text: str) -> tuple[Answer | None, Tokens | None, str]:
    """The body of a chat completion: its answer, the tokens it used, and what is wrong with it.

    The answer is None where another attempt may bring one; the tokens are None where the server does not tell them.
    """
    try:
        data = json.loads(text)
    except ValueError:
        return None, None, f"the answer is not JSON: {text[:80]!r}"
    if not isinstance(data, dict):
        return None, None, f"the answer is not a JSON object: {text[:80]!r}"
    used = _usage(data.get("usage"))
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        reason = f": {message_of(data)}" if data.get("error") else ""
        return None, used, f"the answer has no choices{reason}"
    counted = used or Tokens(0, 0)
    finish, content, refusal = choice.get("finish_reason"), message.get("content"), message.get("refusal")
    if refusal or finish == "content_filter":
        return Answer(None, REFUSAL, str(refusal or finish), *counted), used, ""
    if isinstance(content, str) and content.strip():
        return Answer(content, None, "", *counted), used, ""
    if finish == "length":  # a model that thinks first used up max_tokens; it would do so again
        return Answer(None, EMPTY, "max_tokens was used up before the answer began", *counted), used, ""
    return None, used, "the answer is empty"


def _usage(usage: Any) -> Tokens | None:
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int) or min(prompt, completion) < 0:
        return None
    return Tokens(prompt, completion)


def message_of(body: Any) -> str:
    """The sentence in the body of an error."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(body).split())[:300]


def error_of(status: int, headers: Mapping[str, str], text: str, names: Mapping[str, Any]) -> Exception:
    """What an answer with an error status asks for: `ServiceRefused`, `TryAgain` or `Rejected`.

    Args:
        names: `key` (empty where none is sent), `model` and `url`, for the advice.
    """
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    said = f"the server answered {status}: {message_of(body)}"
    if 300 <= status < 400:
        return ServiceRefused(f"{names['url']} sends requests elsewhere, and is not followed ({said})")
    if status == 401 and not names["key"]:
        return ServiceRefused(f"{NO_KEY} ({said})")
    if status in STOP:
        return ServiceRefused(f"{STOP[status].format(**names)} ({said})")
    if status == 429 and any(word in text for word in QUOTA):
        return ServiceRefused(f"{STOP[402]} ({said})")
    if status in TRY_AGAIN or status >= 500:
        return TryAgain(said, retry_after_s(headers))
    return Rejected(said)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` as seconds or as a date."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError):
                continue
        if seconds == seconds:  # not NaN
            return max(0.0, seconds)
    return None


def offending_field(body: Mapping[str, Any], message: str) -> str | None:
    """The field of a rejected request that servers and models may not know; None if it is another's fault."""
    if "response_format" in body and ("response_format" in message or "json_schema" in message):
        return "response_format"
    if "max_tokens" in body and "max_completion_tokens" in message:
        return "max_tokens"
    for name in OPTIONAL:
        if name in body and name in message:
            return name
    return "response_format" if "response_format" in body else None  # many servers do not say what they dislike


def without_login(url: str) -> tuple[str, tuple[str, ...]]:
    """A server's address without `user:password@`, and these two, if they are there.

    Raises:
        ValueError: not an http address; one with a query, which would be logged with whatever is in it; or plain http
            to another machine, which all on the way could read.
    """
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not place:
        raise ValueError(f"`base_url` must be like https://host/v1. Received an address at {place or 'no host'!r}.")
    if parts.query or parts.fragment:
        raise ValueError(f"`base_url` must end with its path: no `?` or `#`. Received an address at {place!r}.")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ValueError(
            f"`base_url` must be https, unless it is of this machine. Received an http address at {place!r}. "
            f"A server in your own network is reached by `ssh -L 8000:localhost:8000 HOST` and http://127.0.0.1:8000/v1."
        )
    address = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
    if "@" not in parts.netloc:
        return address, ()
    return address, (unquote(parts.username or ""), unquote(parts.password or ""))
