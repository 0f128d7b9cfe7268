"""From texts to token ids in several threads at once, and how long a text may be to be worth it."""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHARACTERS_A_TOKEN = 8  # more than texts have on average: the beginning of a longer text tells whether it can fit
MARGIN = 64  # tokens that a beginning may have more than the same characters have within the whole


class Tokenizing:
    """Token ids of texts, for the threads that read requests.

    It works on copies of its own. A fast tokenizer (of the package `tokenizers`) may encode in several threads as long
    as nobody changes its settings of padding and truncation, which a caller of the original may do at any time; so one
    copy, always called in the same way, is enough. Of any other there is a copy for each thread that is at work.

    Args:
        tokenizer: the model's.
        context: tokens that the model reads.

    `most_characters` is the length of the longest text that can have no more than `context` tokens: `context` times
    the longest token of the vocabulary, and a space after each, since some tokenizers drop it. A vocabulary writes a
    token with a character for each of its bytes or characters, so none stands for more text than its own length; what
    is normalised to less (runs of blanks, in a tokenizer of words) counts as it was sent.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.context = context
        self._original = copy.deepcopy(tokenizer)
        self._is_shared = bool(getattr(tokenizer, "is_fast", False))
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.most_characters = context * (max(map(len, tokenizer.get_vocab()), default=0) + 1)
        self.ids("a")  # padding and truncation that were saved with the tokenizer are put aside here, once

    def is_too_long(self, text: str) -> bool:
        """Whether the beginning alone of a long text has more tokens than the model reads."""
        most = CHARACTERS_A_TOKEN * self.context
        return len(text) > most and len(self.ids(text[:most])) > self.context + MARGIN

    def ids(self, text: str, **options: bool) -> list[int]:
        """Token ids of a text. options: of the tokenizer's call."""
        with self._one() as tokenizer:  # a call, which lets other threads of Python work; `tokenizer.encode` may not
            return tokenizer(text, return_attention_mask=False, return_token_type_ids=False, **options)["input_ids"]

    def rendered(self, messages: list[dict[str, str]], variables: dict[str, Any]) -> str:
        """The text of a conversation in the chat template, up to where the answer begins."""
        with self._one() as tokenizer:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)

    @contextmanager
    def _one(self) -> Iterator[Any]:
        if self._is_shared:
            yield self._original
            return
        try:
            one = self._idle.get_nowait()
        except queue.Empty:
            one = copy.deepcopy(self._original)
        try:
            yield one
        finally:
            self._idle.put(one)
