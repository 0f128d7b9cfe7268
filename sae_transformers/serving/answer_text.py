"""From tokens to text while they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST_CHARACTER = 8  # tokens; more that end in a broken character are broken, not incomplete


class TokensToText:
    """Decodes token by token what `tokenizer.decode(..., skip_special_tokens=True)` would give for all of them.

    A tokenizer decodes a token by its neighbours (spaces, characters of several tokens), so the tokens of the last
    piece are decoded again with each new one, and what they alone give is cut off.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = 0  # of the last piece
        self.told = 0  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that became certain with one more token; maybe none."""
        self.tokens.append(token)
        return self._more(final=len(self.tokens) - self.told >= LONGEST_CHARACTER)

    def finish(self) -> str:
        """What was held back."""
        return self._more(final=True)

    def _more(self, final: bool) -> str:
        before = self._decode(self.tokens[self.start : self.told])
        now = self._decode(self.tokens[self.start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self.start, self.told = self.told, len(self.tokens)
        return now[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class StopTexts:
    """Ends a text before the first of some texts, which may come in several pieces.

    Args:
        stop: none empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The part of the text so far that is certainly before any stop text."""
        if not self.stop or self.found:
            return "" if self.found else piece
        text = self.held + piece
        places = [place for place in (text.find(one) for one in self.stop) if place >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        keep = max(self._begun(text, one) for one in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Characters at the end of `text` that `stop` begins with."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
