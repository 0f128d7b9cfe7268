"""Which latents carry a token: all pre-activations are computed a block of tokens at a time, the chosen ones kept.

No gradient flows here. `sparse_ops.selected_pre_acts` makes what was chosen differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modeling.activations import select
from .sparse_ops import Selection

# Pre-activations at a time: on a CPU what its product reads the encoder once for, on a GPU what keeps it busy.
BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
WIDE = 1024  # numbers of a row from which a first look at groups of them pays

# Of pre-activations (block, d_sae): the chosen latents (nnz,), their values (nnz,), how many each token has (block,).
Chosen = tuple[Tensor, Tensor, Tensor]
Chooser = Callable[[Tensor], Chosen]


class Among:
    """A choice among some latents, made in passing: from the pre-activations that another choice computes.

    Args:
        latents: (m,) int64, all different.
        chooser: of pre-activations (block, m); what it chooses counts in `latents`.
    """

    def __init__(self, latents: Tensor, chooser: Chooser) -> None:
        self.latents, self.chooser = latents, chooser
        self._parts: list[Chosen] = []

    def see(self, pre_acts: Tensor) -> None:
        """Choose for the next tokens, of all their pre-activations (block, d_sae)."""
        self._parts.append(self.chooser(pre_acts.index_select(1, self.latents)))

    def found(self, d_sae: int, dtype: torch.dtype) -> tuple[Selection, Tensor]:
        """As `choose` returns it, of all tokens seen."""
        columns, values, counts = (torch.cat(part) for part in zip(*self._parts, strict=True))
        return Selection(columns, F.pad(counts.cumsum(0), (1, 0)), d_sae, self.latents), values.to(dtype)


@torch.no_grad()
def choose(
    x: Tensor, W_enc: Tensor, bias: Tensor, chooser: Chooser, among: Among | None = None
) -> tuple[Selection, Tensor]:
    """Apply a chooser to `x @ W_enc + bias`.

    Args:
        x: (n_tokens, d_in). Under autocast the product runs in its dtype.
        W_enc: (d_in, d_sae).
        bias: (d_sae,).
        among: sees the same pre-activations.

    Returns:
        The selection, and the pre-activations there, (nnz,), in the dtype of `W_enc`.
    """
    out_dtype, d_sae = W_enc.dtype, W_enc.shape[1]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W_enc, bias = x.to(dtype), W_enc.to(dtype), bias.to(dtype)
    rows = max(1, BLOCK_ELEMENTS.get(x.device.type, 2**22) // max(1, d_sae))
    parts: list[Chosen] = []
    for block in x.split(rows):
        pre_acts = torch.addmm(bias, block, W_enc)
        parts.append(chooser(pre_acts))
        if among is not None:
            among.see(pre_acts)
    latents, values, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return Selection(latents, F.pad(counts.cumsum(0), (1, 0)), d_sae), values.to(out_dtype)


def top_k_of(k: int, *, magnitude: bool = False) -> Chooser:
    """The `k` largest signed pre-activations of each token, or those of the largest `magnitude`; all where there are
    fewer."""

    def chooser(pre_acts: Tensor) -> Chosen:
        by = pre_acts.abs() if magnitude else pre_acts
        values, latents = largest(by, min(k, pre_acts.shape[1]))
        if magnitude:
            values = pre_acts.gather(-1, latents)
        counts = latents.new_full((len(latents),), latents.shape[1])
        return latents.flatten(), values.flatten(), counts

    return chooser


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row (n, width), in any order: values and indices int64, (n, k).

    On a CPU wide rows are cut into as many interleaved groups as leave `4 k` or more of them: the `k` largest lie in
    the `k` groups with the largest maxima, and those few are all that is searched. The values are those of
    `torch.topk`; so are the indices, but among equal numbers at the k-th place.
    """
    size = max((size for size in (8, 4) if rows.shape[1] >= 4 * k * size), default=1)
    if rows.device.type != "cpu" or size == 1 or rows.shape[1] < WIDE:
        return rows.topk(k, dim=-1, sorted=False)
    n_groups = rows.shape[1] // size
    grouped = rows[:, : n_groups * size]
    groups = largest(grouped.unflatten(1, (size, n_groups)).amax(1), k)[1]
    starts = torch.arange(0, n_groups * size, n_groups)
    places = (groups.unsqueeze(1) + starts[:, None]).flatten(1)
    if n_groups * size < rows.shape[1]:
        rest = torch.arange(n_groups * size, rows.shape[1])
        places = torch.cat([places, rest.expand(len(rows), -1)], dim=1)
    values, at = rows.gather(1, places).topk(k, sorted=False)
    return values, places.gather(1, at)


def selected_by(activation: str, k: int) -> Chooser:
    """What an activation of the top-k family keeps of each token."""
    if activation not in ("abs_topk", "groupmax"):
        return top_k_of(k)

    def chooser(pre_acts: Tensor) -> Chosen:
        values, latents = select(pre_acts, k, activation)
        return latents.flatten(), values.flatten(), latents.new_full((len(latents),), k)

    return chooser


def above(threshold: Tensor | float) -> Chooser:
    """Every pre-activation above a threshold, (d_sae,) or ()."""

    def chooser(pre_acts: Tensor) -> Chosen:
        places = (pre_acts > threshold).flatten().nonzero()[:, 0]
        rows = places // pre_acts.shape[1]
        return (
            places - rows * pre_acts.shape[1],
            pre_acts.flatten()[places],
            torch.bincount(rows, minlength=len(pre_acts)),
        )

    return chooser


@torch.no_grad()
def batch_top_k(
    x: Tensor, W_enc: Tensor, bias: Tensor, k: int, among: Among | None = None
) -> tuple[Selection, Tensor]:
    """The `n_tokens * k` largest positive pre-activations of a batch, however many of them a token has.

    "BatchTopK sparse autoencoders" (https://huggingface.co/papers/2412.06410), section 3. Sorting all of a batch is
    slow, so only those above a bound are sorted; the bound comes from a sample, and when it lets too few through the
    batch is read again without one. The result is exact either way.
    """
    if not len(x):
        return choose(x, W_enc, bias, above(0.0), among)
    wanted = k * len(x)
    sample = x[:: max(1, len(x) // 64)]
    in_sample = torch.addmm(bias, sample, W_enc).flatten()
    bound = in_sample.topk(min(2 * k * len(sample), len(in_sample))).values[-1].clamp(min=0)
    selection, values = choose(x, W_enc, bias, above(bound), among)
    if len(values) < wanted and bound > 0:
        selection, values = choose(x, W_enc, bias, above(0.0))
    if len(values) <= wanted:
        return selection, values
    kept = values.topk(wanted, sorted=False).indices.sort().values
    counts = torch.bincount(selection.tokens[kept], minlength=len(x))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return Selection(selection.latents[kept], offsets, W_enc.shape[1]), values[kept]
