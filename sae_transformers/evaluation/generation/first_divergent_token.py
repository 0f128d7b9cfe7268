"""How long two generations agree: the first divergent token."""

from __future__ import annotations

from collections.abc import Sequence


def first_divergent_token(first: Sequence[int], second: Sequence[int]) -> int:
    """Index of the first token that differs, the length if none does.

    SCAR's FDT (https://huggingface.co/papers/2411.07122): greedy tokens after the same prompt, with and without a
    change to the model. A generation that ends earlier differs where it ends.

    Args:
        first, second: ids of the new tokens, without padding; lists or tensors (n,).
    """
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if int(a) != int(b):
            return place
    return min(len(first), len(second))


def mean_first_divergent_token(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> float:
    """`first_divergent_token` averaged over prompts.

    Raises:
        ValueError: the numbers of generations differ, or there is none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"Expected as many generations on both sides, one or more. Received: {len(first)} and {len(second)}."
        )
    return sum(map(first_divergent_token, first, second)) / len(first)
