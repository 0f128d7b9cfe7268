"""Top-k latents from a product in bfloat16, proved to be those of float32.

Every latent is scored in bfloat16. How far a score can lie from the pre-activation is bounded by Cauchy-Schwarz, so
all latents that could be among a token's k largest are known, and only their pre-activations are computed in float32.
Where the processor multiplies bfloat16 fast, choosing costs less than the float32 product alone; the latents are the
same.

With hats for what is rounded to bfloat16 and u for its unit roundoff, 2^-9:

    |score - pre_act| <= |x - x^| |w| + |x^| |w - w^| + c |x^| |w|  +  2 u (|b| + |score|)

The first two terms are the rounding of the factors, c bounds the float32 sum in any order, and the last one is the
rounding of the bias and of a result in bfloat16. That holds on a CPU, where sums are in float32 throughout; a GPU's
library may add parts of them in bfloat16.
"""

from __future__ import annotations

import math
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .latent_selection import BLOCK_ELEMENTS, WIDE, choose, largest, top_k_of
from .sparse_ops import Selection

ROUNDING = 2.0**-8  # of the bias or of a result in bfloat16, twice its unit roundoff
SUM_ERROR = 2.0**-22  # of each term of a float32 sum, four times its unit roundoff
PAYS_BELOW = 0.7  # of a float32 product's time
FEW = 8  # candidates for each chosen latent; a token with more takes the float32 product
GROUP = 8  # scores whose maximum is looked at first


class CertifiedTopK:
    """Chooses the `k` largest pre-activations of each token as `choose(x, W_enc, bias, top_k_of(k))` does.

    n_uncertified: tokens so far that took the float32 product, because too many latents could have been among their
    largest.
    """

    def __init__(self) -> None:
        self.n_uncertified = 0

    @torch.no_grad()
    def choose(self, x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> tuple[Selection, Tensor]:
        """Choose latents of hidden states, where `fits(k, d_sae)`.

        Args:
            x: (n_tokens, d_in), float32, on the CPU as all others.
            W_enc: (d_in, d_sae), float32; fast when stored by latent.
            bias: (d_sae,), float32.

        Returns:
            The selection, k latents a token, and their pre-activations (n_tokens * k,), float32.
        """
        d_sae = W_enc.shape[1]
        latents = torch.empty(len(x), k, dtype=torch.long)
        values = x.new_empty(len(x), k)
        certain = torch.empty(len(x), dtype=torch.bool)
        encoder = _Rounded(W_enc, bias)
        rows = max(1, BLOCK_ELEMENTS["cpu"] // d_sae)
        for start in range(0, len(x), rows):
            block = x[start : start + rows]
            at = slice(start, start + len(block))
            candidates, certain[at] = _candidates(block, encoder, k)
            latents[at], values[at] = _best(candidates, block, W_enc, bias, k)
        others = (~certain).nonzero()[:, 0]
        if len(others):
            selection, pre_acts = choose(x[others], W_enc, bias, top_k_of(k))
            latents[others], values[others] = selection.latents.view(-1, k), pre_acts.view(-1, k)
            self.n_uncertified += len(others)
        offsets = torch.arange(0, len(x) * k + 1, k)
        return Selection(latents.flatten(), offsets, d_sae), values.flatten()


class _Rounded:
    """An encoder in bfloat16, and how far that is from it.

    Latents are looked at in groups, of which latent n belongs to number n modulo `n_groups`, a maximum first. Bounds
    are those of a group: norms of latents differ, and the largest of all would let several times as many pass.
    """

    def __init__(self, W_enc: Tensor, bias: Tensor) -> None:
        by_latent = W_enc.T
        self.weight, self.bias = by_latent.bfloat16(), bias.bfloat16()
        self.group_size = math.gcd(len(bias), GROUP)
        self.n_groups = len(bias) // self.group_size
        # Few rows at a time stay in the cache.
        parts = zip(by_latent.split(512), self.weight.split(512), strict=True)
        norms, errors = zip(
            *(((row.norm(dim=-1)), (row - rounded).norm(dim=-1)) for row, rounded in parts), strict=True
        )
        largest_norm, largest_error = self._of_groups(torch.cat(norms)), self._of_groups(torch.cat(errors))
        in_sums = len(W_enc) * SUM_ERROR * largest_norm
        self._factors = torch.stack([largest_norm, largest_error + in_sums])
        self._bias_error = ROUNDING * self._of_groups(bias.abs())

    def _of_groups(self, of_latents: Tensor) -> Tensor:
        return of_latents.unflatten(0, (self.group_size, self.n_groups)).amax(0)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states (n, d_in): scores (n, d_sae), and by group how far those can be off before they are rounded
        to bfloat16, (n, n_groups)."""
        rounded = x.bfloat16()
        own = torch.stack([(x - rounded).norm(dim=-1), rounded.float().norm(dim=-1)], dim=1)
        return torch.addmm(self.bias, rounded, self.weight.T), torch.addmm(self._bias_error, own, self._factors)


def _candidates(x: Tensor, encoder: _Rounded, k: int) -> tuple[Selection, Tensor]:
    """Latents that could be among the k largest, and which tokens have few enough of them, (n,) bool; of others none.

    k groups have a latent that is certainly as large as the k-th largest of the groups' lower bounds. A latent whose
    upper bound is below that is out, and so is a group whose maximum is.
    """
    scores, error = encoder.scores(x)
    d_sae, n_groups = scores.shape[1], encoder.n_groups
    maxima = scores.unflatten(1, (encoder.group_size, n_groups)).amax(1).float()
    room = ROUNDING * maxima.abs() + error
    low = largest(maxima - room, k)[0].amin(1)
    hit_groups = maxima + room >= low[:, None]
    # NaN compares as false, so that such a token has no group: as in a float32 product, it has no right answer.
    n_hit = hit_groups.sum(1, dtype=torch.int32)
    few = (n_hit >= k) & (n_hit <= FEW * k)
    places = (hit_groups & few[:, None]).flatten().nonzero()[:, 0]
    row = places // n_groups
    first = places + row * (d_sae - n_groups)  # of the group, in the flattened scores
    members = first[:, None] + torch.arange(0, d_sae, n_groups)
    bound = low[row] - error.flatten()[places]
    bound = torch.where(bound >= 0, bound / (1 + ROUNDING), bound / (1 - ROUNDING))
    hit = (scores.flatten()[members] >= bound[:, None]).flatten().nonzero()[:, 0]
    row = row[hit // encoder.group_size]
    counts = torch.bincount(row, minlength=len(x))
    return Selection(members.flatten()[hit] - row * d_sae, F.pad(counts.cumsum(0), (1, 0)), d_sae), few


def _best(candidates: Selection, x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k candidates of each token with the largest pre-activations: latents and values, (n, k)."""
    latents, rows = candidates.latents, candidates.tokens
    pre_acts = candidates.sampled(x, W_enc.T) + bias[latents]
    width = max(k, int(candidates.offsets.diff().max()))
    places = rows * width + torch.arange(len(rows)) - candidates.offsets[rows]
    table = x.new_full((len(x) * width,), -torch.inf).index_copy_(0, places, pre_acts).view(-1, width)
    names = latents.new_zeros(len(x) * width).index_copy_(0, places, latents).view(-1, width)
    values, at = table.topk(k, sorted=False)
    return names.gather(1, at), values


def fits(k: int, d_sae: int) -> bool:
    """Whether k latents are few enough of d_sae for groups of scores to tell them apart."""
    return d_sae >= 4 * k * math.gcd(d_sae, GROUP)


@cache
def pays(d_in: int, d_sae: int) -> bool:
    """Whether scores in bfloat16 save time, by a measured product of that size; small ones are not measured."""
    if d_sae < WIDE:
        return False
    x, weight = torch.ones(256, d_in), torch.ones(d_sae, d_in)  # no random numbers: a run draws those it always drew
    return _seconds(x.bfloat16(), weight.bfloat16()) < PAYS_BELOW * _seconds(x, weight)


def _seconds(x: Tensor, weight: Tensor) -> float:
    """The least of a few products' times, of the processor's own: other work does not disturb it."""
    times = []
    for _ in range(5):
        started = time.process_time()
        torch.mm(x, weight.T)
        times.append(time.process_time() - started)
    return min(times)
