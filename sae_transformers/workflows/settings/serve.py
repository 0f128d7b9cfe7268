"""Settings of `serve`."""

from __future__ import annotations

from dataclasses import dataclass

from ...latents.settings import check_choice, check_integers

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class ServeSettings:
    """How a model is served.

    Args:
        host: address to listen at; 0.0.0.0 is every one of this machine.
        port: port of the server; 0 takes a free one.
        api_key_env: environment variable of a key that requests must bring; by default none is asked.
        max_concurrent: answers that are written together; others wait.
        max_answer_tokens: tokens of an answer, where a request does not say.
        log_level: warning, or info for a line a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    max_concurrent: int = 32
    max_answer_tokens: int = 512
    log_level: str = "warning"

    def __post_init__(self) -> None:
        check_integers(self, port=0, max_concurrent=1, max_answer_tokens=1)
        if self.port > 65535:
            raise ValueError(f"`port` must be at most 65535. Received: port={self.port!r}.")
        check_choice(self, "log_level", LOG_LEVELS)
