"""What requests would cost, and what they have cost, as numbers."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """What a run would cost at most, if its prompts have three characters a token.

    requests: to be sent. answered: already in the cache, or equal to another request. prompt_tokens: estimated.
    completion_tokens: the most that the requests allow. cost: in the unit of the prices; None without prices.
    """

    requests: int
    answered: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:,.4f}"
        return (
            f"{self.requests:,} requests to send ({self.answered:,} already answered), {self.prompt_tokens:,} tokens "
            f"of prompts, at most {self.completion_tokens:,} of answers{cost}"
        )


class Account(NamedTuple):
    """What a run has used.

    requests: sent, each attempt counted. prompt_tokens, completion_tokens: reported by the server.
    presumed_tokens: the most that requests can have used whose use is not known, such as those that timed out.
    cost: of both, in the unit of the prices; None without prices.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    presumed_tokens: int
    cost: float | None


class Tokens(NamedTuple):
    """Of a prompt and of its answer."""

    prompt: int
    completion: int
