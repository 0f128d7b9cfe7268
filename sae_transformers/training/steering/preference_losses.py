"""What a learnt steering is trained for: answers that are preferred, or answers that are likely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def response_log_probs(logits: Tensor, input_ids: Tensor, response: Tensor) -> Tensor:
    """Log-probability of each row's response, the sum over its tokens in nats.

    Args:
        logits: (batch, seq, vocabulary).
        input_ids: (batch, seq).
        response: (batch, seq) bool, tokens of the response; never a row's first column.

    Returns:
        (batch,), float32 or wider.
    """
    said = response[:, 1:]
    chosen = logits[:, :-1][said]  # (n_response_tokens, vocabulary): no others take memory
    wide = torch.promote_types(chosen.dtype, torch.float32)
    of_token = chosen.to(wide).log_softmax(-1).gather(-1, input_ids[:, 1:][said][:, None])[:, 0]
    row = said.nonzero()[:, 0]
    return torch.zeros(len(logits), dtype=wide, device=logits.device).index_add(0, row, of_token)


def preference_margins(chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor) -> Tensor:
    """How much more than the base the steered model prefers the chosen answer, in nats: all are (batch,)
    log-probabilities of answers, the last two without steering."""
    return (chosen - base_chosen) - (rejected - base_rejected)


def preference_loss(margins: Tensor, beta: float) -> Tensor:
    """The mean of -log sigmoid(beta * margin), (): DPO's loss (https://huggingface.co/papers/2305.18290, equation 7),
    with the unsteered model as the reference."""
    return -logsigmoid(beta * margins).mean()


def likelihood_loss(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The mean over answers of the mean negative log-probability of a token, (), nats.

    Args:
        log_probs: (batch,), of whole answers.
        tokens: (batch,) their numbers of tokens.
    """
    return -(log_probs / tokens).mean()
