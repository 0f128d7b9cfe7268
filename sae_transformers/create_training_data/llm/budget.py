"""What requests cost: an estimate before, a limit that is never passed, and the account after."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

from .requests import ChatRequest
from .usage import Account, Estimate, Tokens

TOKENS_PER_MESSAGE = 8  # role and separators of a chat template
TOKENS_PER_REQUEST = 16


class TokenCount:
    """Counts tokens of requests, without the model's tokenizer if need be.

    Args:
        tokenizer: anything with `encode(text)`, or a function from text to a number.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        encode: Callable[[str], Any] | None = getattr(tokenizer, "encode", tokenizer)
        self._encode = encode

    def likely(self, request: ChatRequest) -> int:
        """Tokens of the prompt, with three characters a token where there is no tokenizer."""
        return self._count(request, lambda text: math.ceil(len(text) / 3))

    def bound(self, request: ChatRequest) -> int:
        """The most that the prompt can have: a token of a byte-level vocabulary is at least one byte of UTF-8."""
        return self._count(request, lambda text: len(text.encode("utf-8", "replace")))

    def _count(self, request: ChatRequest, otherwise: Callable[[str], int]) -> int:
        texts = [message["content"] for message in request.messages]
        if request.response_format is not None:
            texts.append(json.dumps(request.response_format))
        total = sum(self._tokenized(text) if self._encode else otherwise(text) for text in texts)
        return total + TOKENS_PER_MESSAGE * len(texts) + TOKENS_PER_REQUEST

    def _tokenized(self, text: str) -> int:
        found = self._encode(text) if self._encode else 0
        return found if isinstance(found, int) else len(found)


class Budget:
    """Tokens and money that may be spent. A request starts only if the worst case of all that run still fits.

    Args:
        max_tokens_total: of prompts and answers together; None for no limit.
        max_cost: in the unit of `prices`; None for no limit.
        prices: of a million tokens of prompts and of answers.
    """

    def __init__(
        self,
        max_tokens_total: int | None = None,
        max_cost: float | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        for name, value in (("max_tokens_total", max_tokens_total), ("max_cost", max_cost)):
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must not be negative. Received: {name}={value!r}.")
        if prices is not None and (len(prices) != 2 or not all(price >= 0 for price in prices)):
            raise ValueError(
                f"`prices` must be two prices of 1,000,000 tokens, in and out. Received: prices={prices!r}."
            )
        if max_cost is not None and prices is None:
            raise ValueError(f"`max_cost` needs `prices`, of 1,000,000 tokens in and out. Received: {max_cost=}.")
        self.max_tokens_total, self.max_cost, self.prices = max_tokens_total, max_cost, prices
        self.ended = False
        self._changed = threading.Condition()
        self._requests = self._running = self._overhead = 0
        self._known = self._presumed = self._reserved = Tokens(0, 0)

    def cost(self, tokens: Tokens) -> float | None:
        if self.prices is None:
            return None
        return (tokens.prompt * self.prices[0] + tokens.completion * self.prices[1]) / 1e6

    def fits(self, tokens: Tokens) -> bool:
        """Whether so many tokens may still be used, beside what was used and what may be used by running requests."""
        total = _add(_add(self._known, self._presumed), _add(self._reserved, tokens))
        if self.max_tokens_total is not None and sum(total) > self.max_tokens_total:
            return False
        cost = self.cost(total)
        return self.max_cost is None or cost is None or cost <= self.max_cost

    def start(self) -> None:
        """A new run: what was used stays used, and requests that fit may be sent."""
        with self._changed:
            self.ended = False

    def reserve(self, tokens: Tokens) -> Tokens | None:
        """Wait until a request that uses at most `tokens` fits; None if it never will. The first that does not fit
        ends the budget for those after it too."""
        with self._changed:
            while not self.ended:
                # A server that once counted more than we thought possible may do so again.
                wanted = Tokens(tokens.prompt + self._overhead, tokens.completion)
                if self.fits(wanted):
                    self._running += 1
                    self._requests += 1
                    self._reserved = _add(self._reserved, wanted)
                    return wanted
                if not self._running:
                    self.ended = True
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return None

    def settle(self, reserved: Tokens, used: Tokens | None, *, sent: bool = True) -> None:
        """End what `reserve` started. `used` None: nobody knows, so all of it counts as used."""
        with self._changed:
            self._running -= 1
            self._requests -= not sent
            self._reserved = Tokens(
                self._reserved.prompt - reserved.prompt, self._reserved.completion - reserved.completion
            )
            if used is None:
                self._presumed = _add(self._presumed, reserved)
            else:
                self._known = _add(self._known, used)
                self._overhead += max(0, sum(used) - sum(reserved))
            self._changed.notify_all()

    def count_one(self, used: Tokens) -> None:
        """Add a request that no limit holds for."""
        with self._changed:
            self._requests += 1
            self._known = _add(self._known, used)

    def account(self) -> Account:
        with self._changed:
            cost = self.cost(_add(self._known, self._presumed))
            return Account(self._requests, *self._known, sum(self._presumed), cost)

    def estimate(self, requests: Iterable[ChatRequest], count: TokenCount, n_all: int) -> Estimate:
        """Of `requests`, which are those among `n_all` that have no answer yet."""
        prompt = completion = sent = 0
        for request in requests:
            sent += 1
            prompt += count.likely(request)
            completion += request.max_tokens
        return Estimate(sent, n_all - sent, prompt, completion, self.cost(Tokens(prompt, completion)))

    def worst_case(self, requests: Iterable[ChatRequest], count: TokenCount) -> Tokens:
        """The most tokens that the requests can use."""
        total = Tokens(0, 0)
        for request in requests:
            total = _add(total, Tokens(count.bound(request), request.max_tokens))
        return total


def _add(one: Tokens, other: Tokens) -> Tokens:
    return Tokens(one.prompt + other.prompt, one.completion + other.completion)
