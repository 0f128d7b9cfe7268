"""Drawing the next tokens of many texts at once, from what temperature, top-k, top-p and min-p leave of each.

No vocabulary is sorted. A token drawn from all of them is kept if the tokens above it have less than top-p of the
probability, which one sum tells; else it goes, with all that stand below it, and the next is drawn from the rest. So
every token comes as often as from the sorted and cut distribution, after 1.05 draws on average where top-p is 0.95.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # tokens whose probabilities are added up first, so that a draw reads few of them one by one


def keep_top_k(scores: Tensor, k: int) -> None:
    """Set the scores (vocabulary,) below the `k`-th largest to -inf, in place, as transformers' `TopKLogitsWarper`."""
    scores.masked_fill_(scores < scores.topk(min(k, len(scores))).values[-1], -torch.inf)


def draw(scores: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Sequence[Callable[[], float]]) -> list[int]:
    """One token for each row of scores, as transformers' `TopPLogitsWarper` and then its `MinPLogitsWarper` cut them.

    Args:
        scores: (n, vocabulary), logits divided by the temperature; -inf where a token may not come.
        top_p, min_p: (n,); 1 and 0 cut nothing. A row's most likely token is always kept.
        uniforms: of each row its random numbers in [0, 1); one is taken, and another each time a token goes.

    Returns:
        n token ids.
    """
    n, size = scores.shape
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    if size % BLOCK:
        weights = F.pad(weights, (0, -size % BLOCK))
    top_p = top_p.to(weights)
    limits = top_p * weights.sum(-1)
    left = at_least(weights, min_p.to(weights)[:, None]) if bool((min_p > 0).any()) else weights
    rows = torch.arange(n, device=scores.device)
    drawn = torch.zeros(n, dtype=torch.long, device=scores.device)
    while len(rows):
        numbers = torch.tensor([uniforms[row]() for row in rows.tolist()], dtype=torch.float64, device=scores.device)
        tokens = pick(left, numbers)
        drawn[rows] = tokens
        # With the tokens as likely as it, which makes the sum too large if anything: one comparison decides most.
        chosen = weights.gather(1, tokens[:, None])
        mass = at_least(weights, chosen).sum(-1) - chosen[:, 0]
        again = ((mass >= limits) & (top_p < 1)).nonzero()[:, 0]
        if not len(again):
            break
        rows, tokens = rows[again], tokens[again]
        weights, left = weights.index_select(0, again), left.index_select(0, again)
        limits, top_p = limits[again], top_p[again]
        above = stands_above(weights, tokens).to(weights)
        mass = (weights * above).sum(-1)
        gone = ((mass >= limits) & (mass > 0)).nonzero()[:, 0]
        rows, limits, top_p = rows[gone], limits[gone], top_p[gone]
        left = (left * above).index_select(0, gone)
        weights = weights.index_select(0, gone)
    return drawn.tolist()


def at_least(weights: Tensor, bounds: Tensor) -> Tensor:
    """Weights (n, vocabulary) with 0 in place of those below a bound, (n, 1); none may be infinite.

    A product with a mask: ten times as fast on a CPU as `torch.where`.
    """
    return torch.ge(weights, bounds, out=torch.empty_like(weights)).mul_(weights)


def stands_above(weights: Tensor, tokens: Tensor) -> Tensor:
    """Which tokens come before others in the order of top-p: the more likely, and of equally likely the later one.

    Args:
        weights: (n, vocabulary). tokens: (n,).

    Returns:
        (n, vocabulary) bool.
    """
    chosen, ids = weights.gather(1, tokens[:, None]), torch.arange(weights.shape[1], device=weights.device)
    return (weights > chosen) | ((weights == chosen) & (ids > tokens[:, None]))


def pick(weights: Tensor, numbers: Tensor) -> Tensor:
    """The tokens at which the running sum of weights first exceeds a share of their sum.

    Args:
        weights: (n, vocabulary) float32, `vocabulary` a multiple of `BLOCK`, none negative, no row all zeros.
        numbers: (n,) float64 in [0, 1), the shares.

    Returns:
        (n,) int64, tokens whose weight is not 0.
    """
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).double().cumsum(-1)
    block = _first_above(sums, numbers * sums[:, -1])
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    upto = sums.gather(1, block[:, None])[:, 0]
    share = ((numbers * sums[:, -1] - before) / (upto - before)).clamp(min=0.0)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    return block * BLOCK + _first_above(inside, share * inside[:, -1])


def _first_above(sums: Tensor, bounds: Tensor) -> Tensor:
    """Where rising sums (n, m) first exceed their bound (n,), (n,) int64; rounding takes none beyond the last rise."""
    last = sums[:, -1]
    bounds = torch.minimum(bounds, torch.nextafter(last, torch.zeros_like(last)))
    return (sums <= bounds[:, None]).sum(-1)
