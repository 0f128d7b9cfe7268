"""Log-likelihoods of tokens given what stands before them, of many rows of any length, with steering or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.batches import length_batches, right_padded
from ...latents.context import context_length
from ..journal import Journal, result_of
from .continuations import steerings_told


class TokenScores(NamedTuple):
    """log_p: of each row the log-probabilities (n_scored,) of its scored tokens, float64 on the CPU. greedy: of each
    row (n_scored,) bool, whether the token was the most likely one."""

    log_p: list[Tensor]
    greedy: list[Tensor]


@torch.no_grad()
def token_scores(
    model: Any,
    rows: Sequence[Sequence[int]],
    first: Sequence[int],
    *,
    steering: Any = None,
    tokens_at_once: int = 1024,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> TokenScores:
    """Score the tokens of each row from `first` on, each given all before it.

    Rows of like length share a pass, padded on the right; logits are made from the first scored position on.

    Args:
        model: a causal language model, with SAEs or without.
        rows: token ids.
        first: of each row the first token to score, 1 or more: the first token of a row has nothing before it.
        steering: a `Steering`, for models with SAEs; False for none; None for what the model has.
        tokens_at_once: of a forward pass, padding counted; a longer row is a pass of its own.
        report: called with the number of rows of each pass.
        journal: has the passes that were done, and gets the others.

    Raises:
        ValueError: a row is longer than the model's context, or has no token to score.
    """
    limit = context_length(model)
    longest = max((len(row) for row in rows), default=0)
    if limit and longest > limit:
        too_long = sum(len(row) > limit for row in rows)
        raise ValueError(
            f"Texts must fit into the model's context of {limit} tokens. Received: {too_long} longer ones, up to "
            f"{longest}; leave them out."
        )
    if wrong := [i for i, (row, start) in enumerate(zip(rows, first, strict=True)) if not 1 <= start < len(row)]:
        i = wrong[0]
        raise ValueError(
            f"Each row needs a token to score and one before it. Received: first={first[i]!r} of {len(rows[i])} "
            f"tokens in row {i}, and {len(wrong) - 1} more."
        )
    log_p: list[Tensor] = [torch.empty(0)] * len(rows)
    greedy: list[Tensor] = [torch.empty(0)] * len(rows)
    acting = getattr(model, "steering", None) if steering is None else steering
    for members in length_batches([len(row) for row in rows], tokens_at_once):
        some, starts = [rows[i] for i in members], [first[i] for i in members]
        found = result_of(
            journal,
            lambda some=some, starts=starts: {"scored": some, "first": starts, **steerings_told([acting])},
            lambda some=some, starts=starts: _scored(model, some, starts, steering),
        )
        for i, values, hits in zip(members, found["log_p"], found["greedy"], strict=True):
            log_p[i], greedy[i] = torch.tensor(values, dtype=torch.float64), torch.tensor(hits, dtype=torch.bool)
        if report:
            report(len(members))
    return TokenScores(log_p, greedy)


def _scored(
    model: Any, rows: Sequence[Sequence[int]], first: Sequence[int], steering: Any
) -> dict[str, list[list[float]]]:
    """`TokenScores` of a pass, as lists."""
    ids, mask = right_padded(rows, model.device)
    width, begin = ids.shape[1], min(first)
    options = {"steering": steering} if hasattr(model, "saes") else {}
    logits = model(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - begin + 1, **options
    ).logits[:, begin - width - 1 : -1]  # (batch, width - begin, vocab): what is said of tokens `begin`, ...
    chosen = logits.gather(-1, ids[:, begin:, None])[..., 0]
    log_p = (chosen.float() - logits.float().logsumexp(-1)).double().cpu()
    best = (logits.amax(-1) <= chosen).cpu()
    scored = [slice(start - begin, len(row) - begin) for row, start in zip(rows, first, strict=True)]
    return {
        "log_p": [log_p[line, part].tolist() for line, part in enumerate(scored)],
        "greedy": [best[line, part].tolist() for line, part in enumerate(scored)],
    }


def start_token(tokenizer: Any) -> int:
    """What stands before the first word of a text, so that this too can be scored: the token that begins texts, or
    the one that ends them.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("The tokenizer needs a token that begins or ends texts. Received: neither.")


def encode_after_start(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Token ids of texts, each after one `start_token`, and the characters (start, end) of each token, (0, 0) for
    that one.

    Raises:
        ValueError: the tokenizer does not give the characters of its tokens (it is not a fast one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Scores of words need a fast tokenizer, which knows the characters of its tokens. "
            f"Received: {type(tokenizer).__name__}."
        )
    begin = start_token(tokenizer)
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = [[begin, *ids] for ids in found["input_ids"]]
    return rows, [[(0, 0), *places] for places in found["offset_mapping"]]
