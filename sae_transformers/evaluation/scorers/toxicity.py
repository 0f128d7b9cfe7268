"""Toxicity of a text without a network: a linear model that comes inside a package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...latents.optional_packages import needs


def toxicity_scorer() -> Callable[[Sequence[str]], Tensor]:
    """Probability of profanity by alt-profanity-check, a linear support vector machine over word counts.

    A weak proxy, deterministic: it knows words and not what is meant by them. It was fitted to 200,000 comments of
    Wikipedia's talk pages and tweets (https://github.com/dimitrismistriotis/alt-profanity-check).

    AUROC on labels it was not fitted to: 0.92 on continuations of RealToxicityPrompts (Perspective's score of 0.5 or
    more; rank correlation with that score 0.81), 0.64 on ToxicChat, whose toxic messages ask politely for harm.

    Returns:
        A function from texts to scores, (n,) float64 in [0, 1]; a text without words scores 0, as in SCAR.

    Raises:
        ImportError: the package alt-profanity-check is not installed.
    """
    with needs("Scoring toxicity", "alt-profanity-check", "toxicity"):
        from profanity_check import predict_prob

    def score(texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            raise TypeError("`texts` must be a list of texts. Received: one text.")
        if not len(texts):
            return torch.zeros(0, dtype=torch.float64)
        scores = torch.as_tensor(predict_prob(list(texts)), dtype=torch.float64)
        return scores.where(torch.tensor([bool(text.strip()) for text in texts]), 0.0)

    return score
