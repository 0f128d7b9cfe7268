"""How a language model at a server, or a local one, is asked. No torch is imported here: the command line uses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...latents.settings import check_integers, check_numbers

if TYPE_CHECKING:
    from .client import LLMClient
    from .local import LocalChat

SERVER_ONLY = ("llm", "llm_url", "max_total_tokens", "max_cost", "price_in")


@dataclass(frozen=True)
class LLMSettings:
    """Which language model is asked, how, and what it may cost.

    Args:
        llm: name of the model at the server.
        llm_url: a server with OpenAI's interface; by default $OPENAI_BASE_URL, or OpenAI.
        local_model: instead of a server: a model's folder or Hub id, run here.
        api_key_env: environment variable of the key, which is sent to the server; by default OPENAI_API_KEY, at OpenAI
            alone.
        concurrency: requests at a time.
        max_total_tokens: tokens that this run may use, of prompts and answers.
        max_cost: money that this run may use, in the unit of the prices.
        price_in: of 1,000,000 tokens of prompts.
        price_out: of 1,000,000 tokens of answers.
        max_attempts: of a request.
        timeout: seconds of an attempt.
        cache: folder of the answers, from which an interrupted run goes on.
        batch_size: requests that a local model answers together.
    """

    PANEL: ClassVar[str] = "Language model"

    llm: str | None = None
    llm_url: str | None = None
    local_model: str | None = None
    api_key_env: str | None = None
    concurrency: int = 8
    max_total_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    max_attempts: int = 6
    timeout: float = 120.0
    cache: Path | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if (self.price_in is None) != (self.price_out is None):
            told = f"price_in={self.price_in!r}, price_out={self.price_out!r}"
            raise ValueError(f"`price_in` and `price_out` go together. Received: {told}.")
        check_integers(self, concurrency=1, max_attempts=1, batch_size=1, max_total_tokens=1)
        check_numbers(self, "timeout", above=0)

    def client(self, default_cache: str | Path | None = None) -> LLMClient | LocalChat:
        """The model that answers.

        Args:
            default_cache: where answers are kept if `cache` does not say; by default in the user's cache folder.

        Raises:
            ValueError: neither a model at a server nor a local one, or a budget for a local one.
        """
        from ..packages import cache_folder

        cache = self.cache or default_cache or cache_folder() / "answers"
        if self.local_model is not None:
            from .local import LocalChat

            given = ", ".join(f"`{name}`" for name in SERVER_ONLY if getattr(self, name) is not None)
            if given:
                raise ValueError(f"`local_model` has no server and no budget. Received also: {given}.")
            return LocalChat(self.local_model, batch_size=self.batch_size, cache=cache)
        if self.llm is None:
            raise ValueError("Which model? Give `llm`, its name at the server; or `local_model`, to run one here.")
        from .client import LLMClient

        return LLMClient(
            self.llm,
            self.llm_url,
            self.api_key_env,
            self.concurrency,
            self.max_total_tokens,
            self.max_cost,
            None if self.price_in is None or self.price_out is None else (self.price_in, self.price_out),
            self.timeout,
            self.max_attempts,
            cache,
        )
