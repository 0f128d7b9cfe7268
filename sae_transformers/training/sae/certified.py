"""Top-k latents from a product in bfloat16, proved to be those of float32.

Every latent is scored in bfloat16. How far a score can lie from the pre-activation is bounded by Cauchy-Schwarz, so
all latents that could be among a token's k largest are known, and only their pre-activations are computed in float32.
Where the processor multiplies bfloat16 fast, choosing costs less than the float32 product alone; the latents are the
same.

With hats for what is rounded to bfloat16 and u for its unit roundoff, 2^-9:

    |score - pre_act| <= |x - x^| max|w| + |x^| max|w - w^| + c |x^| max|w|  +  2 u (|b| + |score|)

The first two terms are the rounding of the factors, c bounds the float32 sum in any order, and the last one is the
rounding of the bias and of a result in bfloat16.
"""

from __future__ import annotations

import math
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .latent_selection import BLOCK_ELEMENTS, WIDE, largest
from .sparse_ops import Selection

ROUNDING = 2.0**-8  # of the bias or of a result in bfloat16, twice its unit roundoff
SUM_ERROR = 2.0**-22  # of each term of a float32 sum, four times its unit roundoff: units that cut off are allowed for
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
            x: (n_tokens, d_in), float32.
            W_enc: (d_in, d_sae), float32; fast when stored by latent.
            bias: (d_sae,), float32.

        Returns:
            The selection, k latents a token, and their pre-activations (n_tokens * k,), float32.
        """
        d_sae = W_enc.shape[1]
        latents = torch.empty(len(x), k, dtype=torch.long, device=x.device)
        values = x.new_empty(len(x), k)
        encoder = _Rounded(W_enc, bias)
        rows = max(1, BLOCK_ELEMENTS.get(x.device.type, 2**22) // d_sae)
        for start in range(0, len(x), rows):
            block = x[start : start + rows]
            at = slice(start, start + len(block))
            candidates, few = _candidates(block, encoder, k)
            latents[at], values[at] = _best(candidates, block, W_enc, bias, k)
            others = (~few).nonzero()[:, 0]
            if len(others):
                values[at][others], latents[at][others] = largest(torch.addmm(bias, block[others], W_enc), k)
                self.n_uncertified += len(others)
        offsets = torch.arange(0, len(x) * k + 1, k, device=x.device)
        return Selection(latents.flatten(), offsets, d_sae), values.flatten()


class _Rounded:
    """An encoder in bfloat16, and how far that is from it."""

    def __init__(self, W_enc: Tensor, bias: Tensor) -> None:
        by_latent = W_enc.T
        self.weight, self.bias = by_latent.bfloat16(), bias.bfloat16()
        # Few rows at a time stay in the cache.
        parts = zip(by_latent.split(512), self.weight.split(512), strict=True)
        self.largest_error = torch.stack([(row - rounded).norm(dim=-1).max() for row, rounded in parts]).max()
        self.largest_norm = by_latent.norm(dim=-1).max()
        self.bias_error = ROUNDING * bias.abs().max()

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states (n, d_in): scores (n, d_sae) and the part of their error that a token's latents share,
        (n,)."""
        rounded = x.bfloat16()
        norms = rounded.float().norm(dim=-1)
        error = (x - rounded).norm(dim=-1) * self.largest_norm + norms * self.largest_error
        error += x.shape[1] * SUM_ERROR * norms * self.largest_norm + self.bias_error
        return torch.addmm(self.bias, rounded, self.weight.T), error


def _candidates(x: Tensor, encoder: _Rounded, k: int) -> tuple[Selection, Tensor]:
    """Latents that could be among the k largest, and which tokens have few enough of them, (n,) bool; of others none.

    The k-th largest maximum of a group is at most the k-th largest score. What lies so far below it that both errors
    together do not reach is out, and so is a group whose maximum does.
    """
    scores, error = encoder.scores(x)
    d_sae = scores.shape[1]
    size = math.gcd(d_sae, GROUP)
    n_groups = d_sae // size
    maxima = scores.unflatten(1, (size, n_groups)).amax(1)
    kth = largest(maxima, k)[0].amin(1).float()
    low = kth - ROUNDING * kth.abs() - 2 * error
    bound = torch.where(low >= 0, low / (1 + ROUNDING), low / (1 - ROUNDING))
    hit_groups = maxima >= bound[:, None]
    few = hit_groups.sum(1, dtype=torch.int32) <= FEW * k
    # NaN compares as false, so that such a token has no group: as in a float32 product, it has no right answer.
    few &= hit_groups.any(1)
    places = (hit_groups & few[:, None]).flatten().nonzero()[:, 0]
    row = places // n_groups
    first = places + row * (d_sae - n_groups)  # of the group, in the flattened scores
    members = first[:, None] + torch.arange(0, d_sae, n_groups, device=x.device)
    hit = (scores.flatten()[members] >= bound[row][:, None]).flatten().nonzero()[:, 0]
    row = row[hit // size]
    counts = torch.bincount(row, minlength=len(x))
    return Selection(members.flatten()[hit] - row * d_sae, F.pad(counts.cumsum(0), (1, 0)), d_sae), few


def _best(candidates: Selection, x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k candidates of each token with the largest pre-activations: latents and values, (n, k)."""
    latents, rows = candidates.latents, candidates.tokens
    pre_acts = candidates.sampled(x, W_enc.T) + bias[latents]
    width = max(k, int(candidates.offsets.diff().max()))
    places = rows * width + torch.arange(len(rows), device=x.device) - candidates.offsets[rows]
    table = x.new_full((len(x) * width,), -torch.inf).index_copy_(0, places, pre_acts).view(-1, width)
    names = latents.new_zeros(len(x) * width).index_copy_(0, places, latents).view(-1, width)
    values, at = table.topk(k, sorted=False)
    return names.gather(1, at), values


def fits(k: int, d_sae: int) -> bool:
    """Whether k latents are few enough of d_sae for groups of scores to tell them apart."""
    return d_sae >= 4 * k * math.gcd(d_sae, GROUP)


@cache
def pays(device: torch.device, d_in: int, d_sae: int) -> bool:
    """Whether scores in bfloat16 save time, by a measured product of that size; small ones are not measured."""
    if d_sae < WIDE:
        return False
    x, weight = torch.randn(256, d_in, device=device), torch.randn(d_sae, d_in, device=device)
    slow = _seconds(x, weight)
    return _seconds(x.bfloat16(), weight.bfloat16()) < PAYS_BELOW * slow


def _seconds(x: Tensor, weight: Tensor) -> float:
    """The least of a few products' times."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        (x @ weight.T)[-1, -1].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)
