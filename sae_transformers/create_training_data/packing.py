"""Texts as sequences of tokens: one each, or joined and cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenRows(NamedTuple):
    """What the model reads, one tensor a sequence.

    ids: (length,) int64. source: (length,) int64, number of the source row of each token.
    """

    ids: list[Tensor]
    source: list[Tensor]


def tokenize(tokenizer: Any, texts: Sequence[str], *, first_row: int, max_length: int, pack: bool) -> TokenRows:
    """Texts as sequences of at most `max_length` tokens; empty texts give none.

    Args:
        first_row: number of the first text in the source.
        pack: join the texts with the end token between and cut them every `max_length` tokens, the rest being a
            shorter sequence; a tokenizer that starts texts with a beginning token has it at each cut. Otherwise a
            text is a sequence, cut at its end.

    Raises:
        ValueError: packing needs an end token, and the tokenizer has none.
    """
    numbers = [i for i, text in enumerate(texts) if text.strip()]
    if not numbers:
        return TokenRows([], [])
    options = {"add_special_tokens": False} if pack else {"truncation": True, "max_length": max_length}
    wanted = [texts[i] for i in numbers]
    found = tokenizer(wanted, return_attention_mask=False, verbose=False, **options)["input_ids"]
    ids = [torch.tensor(row, dtype=torch.long) for row in found]
    source = [torch.full((len(row),), first_row + i) for i, row in zip(numbers, ids, strict=True)]
    if not pack:
        return TokenRows(ids, source)
    if tokenizer.eos_token_id is None:
        raise ValueError("Packing puts an end token between texts. Received: eos_token_id=None; give `pack=False`.")
    joined, origin = [], []
    for row, numbers_of_row in zip(ids, source, strict=True):
        end = torch.full_like(row[:1], tokenizer.eos_token_id)  # empty where the row is
        joined += [row, end]
        origin += [numbers_of_row, numbers_of_row[:1]]
    all_ids, all_source = torch.cat(joined[:-1]), torch.cat(origin[:-1])
    start = tokenizer("")["input_ids"][:1]
    if not start or start[0] != tokenizer.bos_token_id:
        return TokenRows(list(all_ids.split(max_length)), list(all_source.split(max_length)))
    pieces = zip(all_ids.split(max_length - 1), all_source.split(max_length - 1), strict=True)
    begun = [(torch.cat([torch.tensor(start), part]), torch.cat([of[:1], of])) for part, of in pieces]
    return TokenRows([part for part, _ in begun], [of for _, of in begun])
