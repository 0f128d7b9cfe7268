"""The texts in which each latent is strongest, in memory that does not grow with the number of texts.

State is three arrays of shape (d_sae, top_n). A candidate is (latent, text, position, score); its order is total: a
higher score first, then a smaller text number. So the result depends neither on the order in which candidates come,
nor on how often one comes, nor on how they were spread over processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...modeling.configuration_sparse_autoencoder import TOPK_ACTIVATIONS

EMPTY = 2**63 - 1  # text number of an entry that is not there: behind every text
_TOP_BITS = 2**31 - 1
_GATHERED_AT_ONCE = 2**20  # activations that are looked at again for the position of a maximum


class SpanHeap:
    """The `top_n` texts of each latent, one entry a text: the position of its maximum, the first of equal ones.

    score: (d_sae, top_n) float32, descending in a row. text: (d_sae, top_n) int64, `EMPTY` where there is none.
    position: (d_sae, top_n) int32.

    Candidates are gathered and put in many at a time, with three sorts; what cannot get in is left out before.

    Args:
        d_sae: number of latents.
        top_n: entries of a latent.
        min_score: a score must be above it.
        device: of the state.
    """

    def __init__(self, d_sae: int, top_n: int, *, min_score: float = 0.0, device: torch.device | str = "cpu") -> None:
        # An empty entry has the smallest score that counts: one comparison tells what may get in.
        lowest = torch.nextafter(torch.tensor(min_score, dtype=torch.float32), torch.tensor(math.inf)).item()
        self.lowest = lowest
        self.score = torch.full((d_sae, top_n), lowest, dtype=torch.float32, device=device)
        self.text = torch.full((d_sae, top_n), EMPTY, dtype=torch.int64, device=device)
        self.position = torch.zeros(d_sae, top_n, dtype=torch.int32, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._n_waiting, self._room = 0, max(2**18, 2 * d_sae)

    @property
    def d_sae(self) -> int:
        return self.score.shape[0]

    def may_enter(self, latent: Tensor, text: Tensor, score: Tensor) -> Tensor:
        """Which candidates, (n,) each, the last entry of their latent does not keep out, (n,) bool."""
        last, of = self.score[latent, -1], self.text[latent, -1]
        return (score > last) | ((score == last) & (text <= of))

    def add(self, latent: Tensor, text: Tensor, position: Tensor, score: Tensor) -> None:
        """Put in candidates: (n,) each; int64, int64, int32, float32. Of a text and latent, the best one stays."""
        wanted = self.may_enter(latent, text, score).nonzero()[:, 0]
        if not len(wanted):
            return
        self._waiting.append((latent[wanted], text[wanted], position[wanted], score[wanted]))
        self._n_waiting += len(wanted)
        if self._n_waiting > self._room:
            self.settle()

    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is there, by latent and then best first: latent, text, position, score, (n,) each."""
        self.settle()
        return self._entries(torch.arange(self.d_sae, device=self.score.device))

    def _entries(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        text = self.text[latents]
        row, place = (text != EMPTY).nonzero(as_tuple=True)
        latent = latents[row]
        return latent, text[row, place], self.position[latent, place], self.score[latent, place]

    def settle(self) -> None:
        """Sort what waits into the state."""
        if not self._waiting:
            return
        new = [torch.cat(parts) for parts in zip(*self._waiting, strict=True)]
        self._waiting, self._n_waiting = [], 0
        latents = torch.unique(new[0])
        latent, text, position, score = (
            torch.cat(parts) for parts in zip(self._entries(latents), new, strict=True)
        )  # (n,)
        # Positive floats are ordered as their bits are: descending score, then ascending position, in one integer.
        falling = _TOP_BITS - score.view(torch.int32).long()
        order = ((falling << 31) | position).argsort()
        numbers, text_rank = torch.unique(text, return_inverse=True)
        pair = latent * len(numbers) + text_rank
        order = order[pair[order].argsort(stable=True)]  # by latent, by text, and there the best first
        pair = pair[order]
        order = order[torch.cat([torch.ones_like(pair[:1], dtype=torch.bool), pair[1:] != pair[:-1]])]
        order = order[((latent[order] << 31) | falling[order]).argsort(stable=True)]  # equal scores: still by text
        latent = latent[order]
        counts = torch.unique_consecutive(latent, return_counts=True)[1]
        place = torch.arange(len(latent), device=latent.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        kept = place < self.score.shape[1]
        latent, place, order = latent[kept], place[kept], order[kept]
        # Rows only fill up, so every old entry of these latents is written over.
        self.score[latent, place] = score[order]
        self.text[latent, place] = text[order]
        self.position[latent, place] = position[order]


@torch.no_grad()
def add_hidden(
    heap: SpanHeap,
    sae: Any,
    hidden: Tensor,
    text: Tensor,
    position: Tensor,
    *,
    activation: str = "relu",
    pre_acts_at_once: int = 2**22,
    maxima: Tensor | None = None,
) -> None:
    """Give a heap the latents of the tokens of some texts. How they are cut into calls does not matter.

    Args:
        heap: on the device of the SAE.
        sae: a `SparseAutoencoder`.
        hidden: (n_tokens, d_in).
        text: (n_tokens,) int64 on the CPU, the number of each token's text; a text's tokens follow one another.
        position: (n_tokens,) int32 on the CPU.
        activation: `relu` of the pre-activations, or the SAE's `own`.
        pre_acts_at_once: elements of a (tokens, d_sae) array in memory.
        maxima: (d_sae,) float32 on the device of the SAE, the largest magnitudes of its own activation; raised to
            those of these tokens.

    Raises:
        ValueError: an activation is not a number.
    """
    step = max(1, pre_acts_at_once // heap.d_sae)
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        rows = hidden[part].to(sae.device)
        selects, own = sae.config.activation in TOPK_ACTIVATIONS, activation == "own"
        of_text, at = text[part], position[part]
        if own and selects:
            indices, values, _ = sae.encode_sparse(rows)  # (step, k)
            token = torch.arange(len(rows), device=values.device).repeat_interleave(values.shape[-1])
            where = of_text.to(values.device)[token], at.to(values.device)[token]
            heap.add(indices.flatten(), *where, _checked(values.flatten().float()))
            _raise_maxima(maxima, values, indices)
            continue
        if own or maxima is None or sae.config.activation == "relu":
            latents = sae.encode(rows) if own else sae.encode_pre_acts(rows)
            largest = latents if own or maxima is None else latents.relu()
        else:
            latents, code = sae(rows, task=_pre_acts_and_code)  # one product for both
            largest = code.latents
        _add_dense(heap, latents.float() if latents.dtype == torch.float64 else latents, of_text, at)
        if isinstance(largest, Tensor):
            _raise_maxima(maxima, largest)
        else:
            _raise_maxima(maxima, largest.values, largest.indices)


def _pre_acts_and_code(sae: Any, rows: Tensor) -> tuple[Tensor, Any]:
    pre_acts, magnitudes = sae.pre_acts_of(sae.normalize(rows.to(sae.dtype)))
    return pre_acts, sae.code_from(pre_acts, magnitudes)


def _raise_maxima(maxima: Tensor | None, values: Tensor, indices: Tensor | None = None) -> None:
    """Raise (d_sae,) to the largest magnitudes of dense latents (n, d_sae), or of those at `indices`."""
    if maxima is None:
        return
    if indices is None:
        torch.maximum(maxima, values.abs().amax(0).float(), out=maxima)
    else:
        maxima.scatter_reduce_(0, indices.flatten(), values.abs().flatten().float(), "amax")


def _add_dense(heap: SpanHeap, latents: Tensor, text: Tensor, position: Tensor) -> None:
    """The maximum of each text and latent (n_tokens, d_sae), and its position where it may get in."""
    numbers, counts = torch.unique_consecutive(text, return_counts=True)
    best = _checked(torch.stack([piece.amax(0) for piece in latents.split(counts.tolist())]).float())
    candidates = best >= heap.score[:, -1]
    top_n = heap.score.shape[1]
    if int(candidates.sum()) > 2 * best.shape[1] * top_n:  # at the beginning: of these texts too only the best get in
        candidates &= best >= best.T.contiguous().topk(top_n).values[:, -1]
    segment, latent = candidates.nonzero(as_tuple=True)  # (n,), of (n_texts, d_sae)
    ends = counts.cumsum(0).to(segment.device)
    starts, numbers = ends - counts.to(segment.device), numbers.to(segment.device)
    score = best[segment, latent]
    enters = heap.may_enter(latent, numbers[segment], score).nonzero()[:, 0]
    segment, latent, score = segment[enters], latent[enters], score[enters]
    longest = int(counts.max())
    offsets, where = torch.arange(longest, device=segment.device), []
    pairs = max(1, _GATHERED_AT_ONCE // longest)
    for of, column in zip(segment.split(pairs), latent.split(pairs), strict=True):
        # Shorter texts repeat their last token, behind the first maximum, which `argmax` takes.
        rows = torch.minimum(starts[of, None] + offsets, ends[of, None] - 1)  # (pairs, longest)
        entries = rows.mul_(latents.shape[1]).add_(column[:, None])  # of the flat array, which is read twice as fast
        found = latents.flatten().index_select(0, entries.flatten()).view_as(entries).argmax(-1)
        where.append(position.to(of.device)[starts[of] + found])
    if where:
        heap.add(latent, numbers[segment], torch.cat(where), score)


def _checked(scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise ValueError("The SAE must give numbers for every token. Received: NaN; its weights may be broken.")
    return scores
