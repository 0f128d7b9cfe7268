"""Texts and the hidden states of their tokens at one place, without tokens whose states say nothing of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .hidden_states import HiddenStateReader
from .text_input import tokenized

OUTLIER = 10.0  # times the median norm


def usual_states(hidden: Tensor, text_index: Tensor, n_texts: int, max_norm: float | None = None) -> Tensor:
    """Which states say something of their text: those of usual norm, and all of a text that has no other.

    Args:
        hidden: (n_tokens, d). text_index: (n_tokens,) int64, the text of each.
        max_norm: of usual ones; ten times the median norm by default.

    Returns:
        (n_tokens,) bool, on the CPU.
    """
    norms = hidden.norm(dim=-1).cpu()
    usual = norms <= (OUTLIER * norms.median() if max_norm is None else max_norm)
    return usual | (torch.bincount(text_index[usual], minlength=n_texts)[text_index] == 0)


class TextStates(NamedTuple):
    """texts: those that have states, whole. ids: (length,) int64 of each, cut. hidden: (n_tokens, d) float32, on the
    CPU. text_index: (n_tokens,) int64. left_out: how many texts have no states. max_norm: longer states are left out.
    cut: how many texts were longer than they were read.
    """

    texts: Sequence[str]
    ids: Sequence[Tensor]
    hidden: Tensor
    text_index: Tensor
    left_out: int
    max_norm: float
    cut: int = 0


def read_text_states(
    reader: HiddenStateReader,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    max_norm: float | None = None,
    skip_first: int = 1,
    tokens_at_once: int = 4096,
    report: Callable[[int], object] | None = None,
) -> TextStates:
    """States at the reader's only place, of all tokens but each text's first and those of an unusual norm.

    Args:
        reader: of one place.
        tokenizer: of its model.
        texts: a text of first tokens only has no states and is left out.
        max_tokens: longer texts are cut.
        max_norm: states that are longer are outliers; ten times the median norm by default. Give the one of other
            texts to treat these alike.
        skip_first: leading tokens of each text that do not count.
        tokens_at_once: of a forward pass.
        report: called with the number of texts of each batch.

    Raises:
        ValueError: not one place, or no text of two tokens.
    """
    if len(reader.points) != 1 or max_tokens < 2:
        raise ValueError(
            f"Expected a reader of one place and `max_tokens` of 2 or more. "
            f"Received: {len(reader.points)} places, max_tokens={max_tokens!r}."
        )
    rows, cut = tokenized(tokenizer, list(texts), max_length=max_tokens)[1:] if texts else ([], 0)
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    keep = [torch.arange(skip_first, max(skip_first, len(row))) for row in ids]
    if not any(len(places) for places in keep):
        least = "two tokens" if skip_first < 2 else f"{skip_first + 1} tokens"
        raise ValueError(f"Expected texts of {least} or more. Received: {len(texts)} texts, none of them so long.")
    read = reader.read(
        ids,
        keep,
        dtype=torch.float32,
        tokens_at_once=tokens_at_once,
        report=None if report is None else lambda rows: report(len(rows)),
    )
    hidden = next(iter(read.values())).cpu()
    index = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(places) for places in keep]))
    norms = hidden.norm(dim=-1)
    limit = OUTLIER * float(norms.median()) if max_norm is None else max_norm
    hidden, index = hidden[norms <= limit], index[norms <= limit]
    there, index = index.unique(return_inverse=True)
    left: list[int] = there.tolist()
    if not left:
        raise ValueError(f"Expected states of a norm of at most {limit:.6g}. Received: {len(norms)}, all longer.")
    return TextStates(
        [texts[i] for i in left], [ids[i] for i in left], hidden, index, len(texts) - len(left), limit, cut
    )
