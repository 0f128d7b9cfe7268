"""The texts of requests: for the model that is served, and no longer than it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..modeling import SparseAutoencoderConfig
from .bodies import Body, checked_text, shortened
from .errors import RequestError
from .tokenizing import Tokenizing


class PromptReader:
    """Reads the texts of requests for one model.

    Args:
        tokenizer: the model's.
        names: under which it is served; the first is told.
        saes: configs of its SAEs, by number.
        context: tokens that it reads.
    """

    def __init__(
        self, tokenizer: Any, names: Sequence[str], saes: Sequence[SparseAutoencoderConfig], context: int
    ) -> None:
        self.tokenizer, self.names, self.saes, self.context = tokenizer, tuple(names), list(saes), context
        self.tokenizing = Tokenizing(tokenizer, context)

    def check_model(self, body: Body) -> None:
        """Raises RequestError where a request is for another model."""
        name = body.text("model")
        if name not in self.names:
            raise RequestError(
                f"The model {name!r} does not exist. Known: {self.names[0]!r}.", "model", "model_not_found", 404
            )

    def encode(self, text: str, name: str) -> list[int]:
        """Token ids of a text, with the special tokens that texts begin with."""
        self.check_length([text], name)
        self.check_beginning(checked_text(text, name), name)
        ids = self.tokenizing.ids(text)
        if not ids:
            raise RequestError(f"`{name}` has no token. Received: {name}={shortened(text)}.", name)
        return ids

    def check_length(self, texts: Iterable[str], name: str) -> None:
        """Refuse what has too many characters to be read, before any work is put into it.

        Raises:
            RequestError: together they are longer than any text that the model reads.
        """
        length, most = sum(map(len, texts)), self.tokenizing.most_characters
        if length > most:
            raise self.too_long(f"{length} characters, where {most} are the most that can fit", name)

    def check_beginning(self, text: str, name: str) -> None:
        """Raises RequestError where the beginning of a long text shows that all of it cannot fit."""
        if self.tokenizing.is_too_long(text):
            raise self.too_long("more in the beginning of a text", name)

    def too_long(self, received: str, name: str = "messages") -> RequestError:
        """What a request is told whose text has no place in the model's context."""
        told = f"The model reads {self.context} tokens. Received: {received}."
        return RequestError(told, name, "context_length_exceeded")
