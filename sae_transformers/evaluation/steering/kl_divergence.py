"""How far steering moves the next-token distributions of a model: KL divergence on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.batches import length_batches, right_padded
from ..generation.continuations import steerings_told
from ..journal import Journal, result_of

POSITIONS_AT_ONCE = 256  # whose (positions, vocab) distributions are compared at a time


class TokenDivergence(NamedTuple):
    """KL(unsteered || other) in nats of n rows, at the positions that predict the tokens of each row.

    prompt: of each row (prompt tokens - 1,) float64, or None where the other model read another prompt.
    continuation: of each row (continuation tokens,) float64.
    """

    prompt: list[Tensor] | None
    continuation: list[Tensor]


@dataclass(frozen=True)
class Reading:
    """A way to read the same tokens: under a steering, after the prompts or after others, (n) token ids each."""

    steering: Any = None
    prompts: Sequence[Sequence[int]] | None = None


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`sum_v p_v (log p_v - log q_v)`, KL(p || q) in nats.

    Args:
        log_p, log_q: (..., vocab), log-probabilities.

    Returns:
        (...,) float64, 0 or more up to rounding; where p is 0, nothing is added.
    """
    difference = (log_p - log_q).where(log_p > -torch.inf, 0.0)
    return (log_p.exp() * difference).sum(-1, dtype=torch.float64)


@torch.no_grad()
def divergence_from_unsteered(
    model: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    readings: Sequence[Reading],
    *,
    tokens_at_once: int = 512,
    report: Callable[[int], object] | None = None,
    journal: Journal | None = None,
) -> list[TokenDivergence]:
    """KL from the unsteered model's next-token distributions to those of every reading, on the same tokens.

    A steering acts at the positions where it acts when the model generates these continuations, `prompt`, `generated`
    and the like included. Distributions of one batch are held at a time, and no more of them than the positions that
    are compared.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        prompts: n rows of token ids, one token or more each.
        continuations: n rows of token ids, one token or more each. What the unsteered model generated, without
            temperature, makes the mean an estimate of the divergence of whole texts, by the chain rule.
        readings: what is compared with no steering after `prompts`.
        tokens_at_once: of a forward pass, padding counted; a longer row is a pass of its own.
        report: called with the number of rows of each batch, times the readings.
        journal: has the batches that were done, and gets the others.

    Returns:
        One for each reading.

    Raises:
        ValueError: lengths differ, or a row is empty.
    """
    n = len(prompts)
    if len(continuations) != n or any(r.prompts is not None and len(r.prompts) != n for r in readings):
        raise ValueError(f"Expected a continuation for each of {n} prompts. Received: {len(continuations)}.")
    given = [prompts, continuations, *(r.prompts for r in readings if r.prompts is not None)]
    if any(not len(row) for rows in given for row in rows):
        raise ValueError("Every prompt and every continuation needs a token. Received: an empty one.")
    nothing = torch.empty(0, dtype=torch.float64)
    found = [TokenDivergence(None if r.prompts is not None else [nothing] * n, [nothing] * n) for r in readings]
    lengths = [len(prompt) + len(row) for prompt, row in zip(prompts, continuations, strict=True)]
    for members in length_batches(lengths, tokens_at_once):
        after = [continuations[i] for i in members]
        before = [[(prompts if r.prompts is None else r.prompts)[i] for i in members] for r in readings]
        own = [prompts[i] for i in members]
        values = result_of(
            journal,
            lambda own=own, after=after, before=before: {
                "prompts": own, "continuations": after, "read": before,
                **steerings_told([r.steering for r in readings]),
            },
            lambda own=own, after=after, before=before: _divergences(model, own, after, readings, before),
        )  # fmt: skip
        if report is not None:
            report(len(members) * len(readings))
        for into, rows in zip(found, values, strict=True):
            for i, row in zip(members, rows, strict=True):
                count = len(continuations[i])
                into.continuation[i] = torch.tensor(row[-count:], dtype=torch.float64)
                if into.prompt is not None:
                    into.prompt[i] = torch.tensor(row[:-count], dtype=torch.float64)
    return found


def _divergences(
    model: Any, prompts: Sequence[Any], after: Sequence[Any], readings: Sequence[Reading], before: Sequence[Any]
) -> list[list[list[float]]]:
    """Of each reading, of each row of a batch, KL at its positions; those of the continuation alone, where `before`,
    what each reading reads, are other prompts."""
    found = []
    reference = _log_probabilities(model, prompts, after, False)
    for reading, read in zip(readings, before, strict=True):
        other = _log_probabilities(model, read, after, reading.steering or False)
        rows = []
        for expected, seen, row in zip(reference, other, after, strict=True):
            if reading.prompts is not None:
                expected, seen = expected[-len(row) :], seen[-len(row) :]
            rows.append(_by_position(expected, seen).tolist())
        found.append(rows)
    return found


def _log_probabilities(
    model: Any, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], steering: Any
) -> list[Tensor]:
    """Of each row (tokens - 1, vocab) float32, at the positions that predict its tokens but the first."""
    rows = [[*a, *b] for a, b in zip(before, after, strict=True)]
    ids, mask = right_padded(rows, model.device)
    options: dict[str, Any] = {"steering": steering}
    if steering:  # where each prompt ends, as `generate` tells it
        ends = [[0, 0, len(row)] for row in before]
        options = {"steering": model.prepare_steering(steering), "steering_rows": torch.tensor(ends).to(model.device)}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return [logits[line, : len(row) - 1].float().log_softmax(-1) for line, row in enumerate(rows)]


def _by_position(log_p: Tensor, log_q: Tensor) -> Tensor:
    parts = zip(log_p.split(POSITIONS_AT_ONCE), log_q.split(POSITIONS_AT_ONCE), strict=True)
    return torch.cat([kl_divergence(p, q) for p, q in parts]).cpu()
