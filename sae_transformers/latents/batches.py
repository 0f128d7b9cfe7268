"""Rows of like length together, padded on the right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def length_batches(
    lengths: Sequence[int], tokens_at_once: int, kinds: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Numbers of the rows, the longest of a kind first, in batches of limited padded size; without empty rows. A
    longer row is a batch of its own."""
    found = kinds or [0] * len(lengths)
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-found[i], -lengths[i]))
    for _, same in itertools.groupby(order, key=lambda i: found[i]):
        waiting = list(same)
        while waiting:
            size = max(1, tokens_at_once // lengths[waiting[0]])
            yield waiting[:size]
            waiting = waiting[size:]


def right_padded(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token ids of rows and their mask, (batch, width) int64 each; 0 at padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
