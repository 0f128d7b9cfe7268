"""What a generated text is worth besides its concept: likely under the unsteered model, and not repeating itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def continuation_mask(continuation: Tensor, eos_token_id: int | Sequence[int] | None) -> Tensor:
    """Which generated tokens count: all up to and with the first end of text.

    Args:
        continuation: (batch, new), token ids after the prompt; whatever follows an end of text is padding.
        eos_token_id: one id, several, or None for none.

    Returns:
        mask, (batch, new) bool.
    """
    ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ends = torch.isin(continuation, torch.tensor(ids, dtype=continuation.dtype, device=continuation.device))
    return ends.cumsum(-1) - ends.long() == 0


@torch.no_grad()
def continuation_perplexity(
    model: Any, input_ids: Tensor, attention_mask: Tensor, prompt_length: int, *, rows_at_once: int = 16
) -> float:
    """Perplexity of continuations given their prompts: exp of the mean negative log-likelihood of a generated token.

    Args:
        model: a causal language model; called as it is, so switch its steering off before.
        input_ids: (batch, prompt_length + new), prompts padded on the left.
        attention_mask: (batch, prompt_length + new), 0 at padding and after the end of a continuation.
        prompt_length: columns of the prompt, at least 1.
        rows_at_once: rows of a forward pass; bounds the memory that the logits take.

    Returns:
        Perplexity, at least 1; tokens of all rows count alike.

    Raises:
        ValueError: there is no generated token, or the prompt is empty.
    """
    if prompt_length < 1:
        raise ValueError(f"`prompt_length` must be at least 1. Received: prompt_length={prompt_length!r}.")
    counted = attention_mask[:, prompt_length:].bool()
    if not bool(counted.any()):
        raise ValueError("There is no generated token to judge. Received: attention_mask of 0 after the prompt.")
    total = 0.0
    for ids, mask, keep in zip(*(t.split(rows_at_once) for t in (input_ids, attention_mask, counted)), strict=True):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logits = logits[:, prompt_length - 1 : -1].float()  # (rows, new, vocab)
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, prompt_length:], reduction="none")
        total += float(losses[keep].sum())
    return math.exp(total / int(counted.sum()))


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Share of the n-grams of words that occurred earlier in the same text, averaged over texts.

    One minus the distinct-n of Li et al. (https://huggingface.co/papers/1510.03055), per text; a text shorter than
    `n` words repeats nothing.

    Returns:
        A number in [0, 1).

    Raises:
        ValueError: there is no text, or `n` is below 1.
    """
    if n < 1 or not texts:
        raise ValueError(f"Expected texts and n of at least 1. Received: {len(texts)} texts, n={n!r}.")
    shares = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)
