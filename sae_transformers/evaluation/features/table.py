"""What every feature of an SAE writes into the logits: statistics of its logit weights, and the tokens at both ends.

    P = W_dec @ W_U        (d_sae, vocab): what a unit of each latent adds to each logit, the final norm's length aside

Per latent: mean, std (population), skewness mean(z^3) and kurtosis mean(z^4) (3 for a normal distribution, not 0) of
its row of P, with z = (P - mean) / std. P itself is never held: rows of it are made, measured and forgotten. The
weights alone are read, so that no text is needed; firing frequencies come from texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.progress import Keep, keep_nothing
from ...modeling import SparseAutoencoder
from ..journal import UNWATCHED, Watch
from .unembedding import matching_tokens, output_weight, token_texts, unembedding

AT_ONCE = 1 << 23  # elements of P at a time: 32 MiB of float32
MEASURED_AT_ONCE = 1 << 19  # of these, so many are measured together: what a cache holds
PART = 4096  # rows that are kept together
CHUNK = 64  # tokens whose maximum decides whether they are looked at, when the largest of a row are sought
NO_LOGITS = ("mlp_in", "mlp_act", "attn_heads")  # places that are not the residual stream
NEVER = 1e-10  # added to a frequency before its logarithm, as SAELens does: a dead latent has -10


@dataclass(frozen=True, eq=False)
class LogitWeights:
    """Of n latents. mean, std, skewness, kurtosis: (n,) float64 on the CPU; skewness and kurtosis are nan where the
    weights do not vary. top_ids, bottom_ids: (n, k) int64, the tokens of the largest and of the smallest weights, the
    most extreme first. top_weights, bottom_weights: (n, k) float32, these weights."""

    mean: Tensor
    std: Tensor
    skewness: Tensor
    kurtosis: Tensor
    top_ids: Tensor
    top_weights: Tensor
    bottom_ids: Tensor
    bottom_weights: Tensor


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """A row a latent, of all d_sae.

    weights: see `LogitWeights`. top_tokens, bottom_tokens: the texts of its tokens.
    log10_frequency: (d_sae,) float64, log10(share of tokens where the latent is active + 1e-10), or None.
    dead: (d_sae,) bool, active on no token; or None. coherence: (d_sae,) float64, or None.
    published_sparsity: (d_sae,) float64, log10 of the firing frequency as a release gives it, or None.
    contexts: the texts on which each latent is strongest, best first, with context_scores; or None.
    notes: further columns by name, one text a latent, such as explanations.
    facts: what was done, as JSON values.
    """

    weights: LogitWeights
    top_tokens: list[list[str]]
    bottom_tokens: list[list[str]]
    log10_frequency: Tensor | None = None
    dead: Tensor | None = None
    coherence: Tensor | None = None
    contexts: list[list[str]] | None = None
    context_scores: list[list[float]] | None = None
    notes: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    published_sparsity: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights.mean)

    @property
    def sparsity(self) -> Tensor | None:
        """log10 of how often each latent fires, (d_sae,): as published, else as counted on a text."""
        return self.log10_frequency if self.published_sparsity is None else self.published_sparsity


@torch.no_grad()
def feature_table(
    model: Any,
    tokenizer: Any,
    sae: SparseAutoencoder,
    *,
    top_k: int = 10,
    fold_norm: bool = True,
    centre: bool = True,
    match: str | None = None,
    watch: Watch = UNWATCHED,
) -> FeatureTable:
    """The table of a whole SAE from weights alone.

    Args:
        model: the causal language model that the SAE was trained on, with SAEs or without.
        sae: one that writes into the residual stream.
        top_k: tokens at each end.
        fold_norm, centre: see `unembedding`.
        match: a regular expression; only tokens whose text it matches count. By default all that the tokenizer has.
        watch: is told the number of rows done, block by block; has the rows that were done, and gets the others.

    Raises:
        ValueError: the SAE does not write into this model's residual stream, the model has no unembedding, no token
            matches, or there are fewer than `top_k`.
    """
    base = getattr(model, "lm", model)
    rows, facts = decoder_rows(sae, base.config.get_text_config().hidden_size)
    vocabulary = matching_tokens(tokenizer, match, len(output_weight(base)))
    W_U = unembedding(base, fold_norm=fold_norm, centre=centre, vocabulary=vocabulary)
    found = logit_weights(rows, W_U, top_k=top_k, vocabulary=vocabulary, report=watch.report, keep=watch.keep)
    used, place = torch.unique(torch.cat([found.top_ids, found.bottom_ids]), return_inverse=True)
    texts = token_texts(tokenizer, used.tolist())
    tokens = [[texts[i] for i in row] for row in place.tolist()]
    facts |= {"fold_norm": fold_norm, "centre": centre, "match": match, "tokens": W_U.shape[1], "d_sae": len(rows)}
    return FeatureTable(found, tokens[: len(rows)], tokens[len(rows) :], facts=facts)


@torch.no_grad()
def logit_weights(
    W_dec: Tensor,
    W_U: Tensor,
    *,
    top_k: int = 10,
    vocabulary: Tensor | None = None,
    elements_at_once: int = AT_ONCE,
    report: Callable[[int], object] | None = None,
    keep: Keep = keep_nothing,
) -> LogitWeights:
    """Statistics and extreme tokens of each row of `W_dec @ W_U`.

    Args:
        W_dec: (n, d_model), decoder rows.
        W_U: (d_model, vocab), see `unembedding.unembedding`.
        top_k: tokens at each end, at most vocab. Of equal weights any may be chosen.
        vocabulary: (vocab,) int64, the id of each column of `W_U`; its number by default.
        elements_at_once: of the product; more is hardly faster and takes more memory.
        report: called with the number of rows done, block by block.
        keep: has rows that were done, some thousands a part, and gets the others.

    Raises:
        ValueError: widths that differ, no token, `top_k` out of range, or a weight that is not finite.
    """
    n, vocab = len(W_dec), W_U.shape[-1]
    if W_dec.ndim != 2 or W_U.ndim != 2 or W_dec.shape[1] != W_U.shape[0] or not vocab or not n:
        raise ValueError(
            f"Expected decoder rows (n, d_model) and an unembedding (d_model, vocab). "
            f"Received: {tuple(W_dec.shape)} and {tuple(W_U.shape)}."
        )
    if not 1 <= top_k <= vocab:
        raise ValueError(f"`top_k` must be in [1, {vocab}], the tokens there are. Received: top_k={top_k!r}.")
    dtype = torch.promote_types(torch.promote_types(W_dec.dtype, W_U.dtype), torch.float32)
    W_U = W_U.to(dtype)
    rows = max(1, min(n, elements_at_once // vocab))
    product = torch.empty(rows, vocab, dtype=dtype, device=W_U.device)
    of_part = rows * max(1, PART // rows)
    parts = []
    for start in range(0, n, of_part):
        some = W_dec[start : start + of_part]
        told: list[int] = []

        def make(some: Tensor = some, told: list[int] = told) -> dict[str, Tensor]:
            blocks = []
            for block in some.split(rows):
                blocks.append(_block(block, W_U, product, top_k))
                told.append(len(block))
                if report:
                    report(len(block))
            return {name: torch.cat([one[name] for one in blocks]) for name in blocks[0]}

        parts.append(keep({"logit weights": [start, len(some), top_k, elements_at_once]}, make))
        if report and not told:
            report(len(some))
    moments = torch.cat([part["moments"] for part in parts]).T
    ids, weights = (torch.cat([part[name] for part in parts]) for name in ("ids", "weights"))  # (n, 2, k)
    if not bool(torch.isfinite(moments[:2]).all()):
        raise ValueError("Logit weights must be finite. Received: some that are not; the SAE's weights may be broken.")
    if vocabulary is not None:
        ids = vocabulary.cpu()[ids]
    mean, std, skewness, kurtosis = moments.contiguous()
    ends = (one[:, end].contiguous() for end in (0, 1) for one in (ids, weights))
    return LogitWeights(mean, std, skewness, kurtosis, *ends)


def _block(rows: Tensor, W_U: Tensor, product: Tensor, top_k: int) -> dict[str, Tensor]:
    """Of some decoder rows (n, d_model) `moments` (n, 4) float64, and `ids` and `weights` (n, 2, k) of the largest and
    of the smallest; `product` is written over."""
    P = torch.mm(rows.to(product), W_U, out=product[: len(rows)])  # (n, vocab)
    few = max(1, MEASURED_AT_ONCE // P.shape[1]) if P.device.type == "cpu" else len(P)
    moments = torch.empty(len(P), 4, dtype=torch.float64)
    ids = torch.empty(len(P), 2, top_k, dtype=torch.long)
    weights = torch.empty(len(P), 2, top_k, dtype=torch.float32)
    for first in range(0, len(P), few):
        part, place = P[first : first + few], slice(first, first + few)
        for end, sign in enumerate((1, -1)):
            values, found = _largest(part if sign > 0 else -part, top_k)
            ids[place, end], weights[place, end] = found.cpu(), (sign * values).float().cpu()
        moments[place] = _moments(part).T.cpu()
    return {"moments": moments, "ids": ids, "weights": weights}


def _moments(P: Tensor) -> Tensor:
    """Mean, std, skewness and kurtosis of each row, (4, n) float64; overwrites `P`."""
    mean = P.mean(-1, keepdim=True)
    rest = P.sub_(mean)
    squares = rest.square()
    second = squares.mean(-1).double()
    third = torch.linalg.vecdot(squares, rest).double() / P.shape[-1]
    fourth = torch.linalg.vecdot(squares, squares).double() / P.shape[-1]
    # Rounding leaves a constant row with a spread of some units in the last place.
    tiny = (mean[:, 0].abs().double() * torch.finfo(P.dtype).eps * 8) ** 2
    varies = second > tiny
    std = torch.where(varies, second, 0.0).sqrt()
    nan = torch.full_like(std, torch.nan)
    return torch.stack(
        [
            mean[:, 0].double(),
            std,
            torch.where(varies, third / second**1.5, nan),
            torch.where(varies, fourth / second.square(), nan),
        ]
    )


def _largest(P: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`P.topk(k)`, by way of the maxima of chunks: the k largest of a row lie in k chunks of largest maxima."""
    n, vocab = P.shape
    whole = vocab // CHUNK
    if whole <= 2 * k:
        values, found = P.topk(k, dim=-1)
        return values, found
    chunks = P[:, : whole * CHUNK].unflatten(-1, (whole, CHUNK))
    chosen = chunks.amax(-1).topk(k, dim=-1).indices  # (n, k)
    columns = (chosen[..., None] * CHUNK + torch.arange(CHUNK, device=P.device)).flatten(1)  # (n, k * CHUNK)
    rest = torch.arange(whole * CHUNK, vocab, device=P.device).expand(n, -1)
    columns = torch.cat([columns, rest], dim=-1)
    values, place = P.gather(-1, columns).topk(k, dim=-1)
    return values, columns.gather(-1, place)


def decoder_rows(sae: SparseAutoencoder, width: int) -> tuple[Tensor, dict[str, Any]]:
    """What a unit of each latent adds to the residual stream, (d_sae, d_model), and what is to be said of the unit.

    Rows are the decoder's own, times the constant that undoes a normalisation by a constant. Where the SAE normalises
    each token by its own length, a unit of a latent is worth that token's length more: `unit` says so, and only
    mean and std depend on it.

    Args:
        width: of the model's residual stream.

    Raises:
        ValueError: the SAE writes another width, or at a place that is not the residual stream.
    """
    config = sae.config
    d_out = config.d_out or config.d_in
    if len(config.hooks_out) > 1:
        raise ValueError(
            f"Logit weights are of an SAE that writes to one place. Received: one that writes {config.write_at}."
        )
    if d_out != width:
        raise ValueError(
            f"The SAE must write {width} numbers, the width of this model's residual stream. Received: "
            f"d_out={d_out!r}; give the model that the SAE was trained on."
        )
    if config.placed and config.write_at.rpartition(".")[2] in NO_LOGITS:
        raise ValueError(
            f"Logit weights need an SAE that writes into the residual stream (resid_pre, resid_post, mlp_out, "
            f"attn_out). Received: one at {config.write_at}."
        )
    rows, unit = sae.W_dec.detach(), "hidden state"
    if config.normalize_output and config.normalization == "scalar":
        scale = config.output_scale or config.input_scale
        rows = rows / scale
        unit = f"hidden state (decoder rows divided by the SAE's scale, {scale:g})"
    elif config.normalize_output and config.normalization in ("layer_norm", "constant_norm"):
        unit = f"the SAE's normalised input ({config.normalization}): a token's own scale multiplies mean and std"
    facts = {"unit": unit, "place": config.write_at if config.placed else None}
    facts["transcoder"] = bool(config.placed and not config.reconstructs)
    return rows, facts


class Firing(NamedTuple):
    """counts: (d_sae,) int64, on how many of the `tokens` each latent is active. maxima: (d_sae,), the largest
    activation of each by magnitude, in the SAE's dtype and on its device: see `measure_feature_max`."""

    counts: Tensor
    tokens: int
    maxima: Tensor


@torch.no_grad()
def count_firing(sae: SparseAutoencoder, batches: Iterable[Tensor], *, tokens_at_once: int = 2048) -> Firing:
    """How often each latent is active, and how strongly at most.

    Args:
        batches: hidden states, (n_tokens, d_in) each, at the place that the SAE reads.
        tokens_at_once: of an encoding.
    """
    counts, tokens = torch.zeros(sae.config.d_sae, dtype=torch.long), 0
    maxima = torch.zeros(sae.config.d_sae, dtype=sae.dtype, device=sae.device)
    for batch in batches:
        for hidden in batch.split(tokens_at_once):
            indices, values, _ = sae.encode_sparse(hidden.to(device=sae.device, dtype=sae.dtype))
            counts += torch.bincount(indices[values != 0].cpu(), minlength=len(counts))
            maxima.scatter_reduce_(0, indices.flatten(), values.abs().flatten(), "amax")
            tokens += len(hidden)
    return Firing(counts, tokens, maxima)


def firing_frequency(counts: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """`log10(counts / n_tokens + 1e-10)` (d_sae,) float64 and the dead flag (d_sae,) bool: active on no token.

    Args:
        counts: (d_sae,) int64, from `count_firing` or `SparseCodes.counts` of tokens.
        n_tokens: that were looked at.

    Raises:
        ValueError: there is no token, or a latent was active more often than there are tokens.
    """
    if n_tokens < 1 or int(counts.min()) < 0 or int(counts.max()) > n_tokens:
        raise ValueError(
            f"Expected counts in [0, n_tokens], of 1 token or more. "
            f"Received: {int(counts.min())} to {int(counts.max())}, n_tokens={n_tokens!r}."
        )
    return (counts.double().cpu() / n_tokens + NEVER).log10(), counts.cpu() == 0
