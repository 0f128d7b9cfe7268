"""What is wrong with a request, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is not served.

    Args:
        message: the reason, for people.
        param: the field of the body at fault.
        code: a word for programs, such as `model_not_found`.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        message, param = _written(self.message), None if self.param is None else _written(self.param)
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _written(text: str) -> str:
    """The text with halves of characters, which JSON may bring, spelt out."""
    return text.encode(errors="backslashreplace").decode()
