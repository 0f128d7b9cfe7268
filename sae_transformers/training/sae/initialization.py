"""Where a sparse autoencoder starts, from data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...latents.diffmean import fit_diffmean
from ...modeling import SparseAutoencoder


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to all points, by Weiszfeld's iteration.

    Args:
        points: (n, d), floating point.
        tolerance: stops where a step is shorter than this times the median distance.

    Returns:
        (d,), in the dtype of `points`.
    """
    median = points.mean(0)
    for _ in range(iterations):
        distances = (points - median).norm(dim=-1).clamp(min=torch.finfo(points.dtype).tiny ** 0.5)
        weights = 1 / distances
        new = (weights @ points) / weights.sum()
        moved = (new - median).norm()
        median = new
        if moved <= tolerance * distances.median():
            break
    return median


@torch.no_grad()
def initialize(sae: SparseAutoencoder, sample: Tensor, *, weights: str, bias: str) -> None:
    """Set the start of an SAE in place.

    `normalization="scalar"` with its `input_scale` still 1 gets the scale that makes the mean norm sqrt(d_in).

    Args:
        sample: (n, d_out), what the SAE will reconstruct; unusual norms left out.
        weights: `tied_unit_norm`, `kaiming`, `linear` or `keep`; see `SaeTrainingArguments.weight_init`.
        bias: `mean`, `geometric_median`, `zeros` or `keep`; see `SaeTrainingArguments.bias_init`.
    """
    config = sae.config
    if weights != "keep":
        sae.reset_parameters()
    if weights == "kaiming":
        nn.init.normal_(sae.W_dec, std=math.sqrt(2 / config.d_in))
    elif weights == "linear":
        nn.init.uniform_(sae.W_dec, -1 / math.sqrt(config.d_in), 1 / math.sqrt(config.d_in))
    if weights in ("kaiming", "linear") and not config.tied and config.d_in == config.d_out:
        sae.W_enc.copy_(sae.W_dec.T)
    if bias == "keep":
        return
    sample = sample.to(sae.W_dec)
    if config.normalization == "scalar" and config.input_scale == 1.0:
        config.input_scale = math.sqrt(config.d_in) / float(sample.norm(dim=-1).mean())
    if bias == "zeros":
        sae.b_dec.zero_()
        return
    if config.d_in == config.d_out:
        sample = sae.normalize(sample).x
    elif config.normalization == "scalar":
        sample = sample * (config.output_scale or config.input_scale)
    sae.b_dec.copy_(geometric_median(sample) if bias == "geometric_median" else sample.mean(0))


@torch.no_grad()
def scale_decoder_to_unit_norm(sae: SparseAutoencoder) -> None:
    """Divide each decoder row by its norm; a row of zeros stays."""
    for rows in sae.W_dec.split(rows_in_cache(sae.W_dec)):
        norms = rows.norm(dim=-1, keepdim=True)
        rows.div_(norms.where(norms > 0, 1.0))


def rows_in_cache(matrix: Tensor) -> int:
    """Rows of a matrix to take at a time: on a CPU those that stay in its cache from one operation to the next."""
    return max(1, 2**18 // matrix.shape[1]) if matrix.device.type == "cpu" else len(matrix)


@torch.no_grad()
def point_latent_at(sae: SparseAutoencoder, latent: int, direction: Tensor) -> None:
    """Set the encoder column and decoder row of `latent` to a direction, (d_in,), of norm 1.

    A latent gets a reconstruction gradient only where it is among the top k. One that starts along the concept wins
    its place on the concept's tokens early, so that its decoder row, which steers, is fitted too.
    """
    if not bool(direction.norm() > 0):
        raise ValueError(f"`direction` must not be zero or NaN. Received: norm {float(direction.norm())!r}.")
    unit = (direction / direction.norm()).to(sae.W_dec)
    sae.W_dec[latent] = unit
    if not sae.config.tied:
        sae.W_enc[:, latent] = unit


def point_concepts_at_diffmean(sae: SparseAutoencoder, hidden: Tensor, labels: Tensor) -> None:
    """Start each concept's latent along the difference of means of the tokens with and without it.

    Args:
        hidden: (n_tokens, d_in).
        labels: (n_tokens, n_concepts) in the order of `config.concepts`, 1, 0, or -100 for unknown.
    """
    for column, latent in enumerate(sae.config.concepts.values()):
        known = labels[:, column] >= 0
        point_latent_at(sae, latent, fit_diffmean(hidden[known], labels[known, column]))


def usual_norm_limit(hidden: Tensor, times: float = 10.0) -> float:
    """`times` the median norm of hidden states (n_tokens, d), NaN and infinite ones left out.

    A few tokens (often the first) carry activations a hundred times the usual ("Massive activations in large language
    models", https://huggingface.co/papers/2402.17762); they say nothing of the text and would own every mean.
    """
    norms = hidden.float().norm(dim=-1)
    return times * float(norms[norms.isfinite()].median())


def usual_norm(hidden: Tensor, times: float = 10.0) -> Tensor:
    """Rows (n_tokens, d) whose norm is at most `times` the median, (n_tokens,) bool."""
    return hidden.float().norm(dim=-1) <= usual_norm_limit(hidden, times)
