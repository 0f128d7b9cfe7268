"""Steering towards a topic, measured: how well an SAE and reference texts can represent the topic, and what it did.

The paper (https://huggingface.co/papers/2506.12576) names a coverage, which its code counts, and a contamination,
whose formula it does not give; the contamination, the other parts and their product below are ours.

For a topic's texts T and reference texts R, with m_j(X) the share of latent j in the activity of a text, mean over X,
and s_j the latent's score:

    coverage              share of latents that are active in a text of R
    topic_coverage        sum_j m_j(T) [j is active in R]                  what of the topic's activity has a score
    contamination         sum_j w_j (1 - q_j) / sum_j w_j                  what is promoted without being the topic's
        w_j = m_j(R) max(0, s_j - sum_i m_i(R) s_i / sum_i m_i(R))         promoted: a score above the usual one
        q_j = m_j(T) / (m_j(T) + m_j(R))                                   1 only in the topic, 0 never in it
    reconstruction_error  sum |x - SAE(x)|^2 / sum |x - mean(R)|^2         over the topic's tokens; 1 is no better
                                                                           than the mean state of R
    uncertainty           1 - coverage topic_coverage (1 - contamination) (1 - min(1, reconstruction_error))

Two thresholds say when a topic is represented badly: of its uncertainty, a quantile of topics made of reference texts,
and of its error, what is usual among the reference texts (`usual_error`). These may hold a kind that is represented
badly, which then makes up the quantile, and whose latents are so much its own that a small contamination outweighs its
error in the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ...latents.sparse_codes import SparseCodes
from ...modeling import SparseAutoencoder
from ..generation.fluency import repetition

KINDS = ("unaligned", "mixed", "aligned")
NORMAL_MAD = NormalDist().inv_cdf(0.75)  # median distance from the median, in standard deviations
LEAST_ERROR = 1e-6  # below, a text is reconstructed exactly
TWICE = 2 / 3  # q_j of a latent that has twice the share in the topic's texts


@dataclass(frozen=True)
class TextEvidence:
    """What is known of some texts, one row each.

    summaries: (n, d_sae), the share of each latent. embeddings: (n, d), of unit length.
    error, energy: (n,) float64, sums over a text's tokens of |x - SAE(x)|^2 and |x - centre|^2.
    """

    summaries: SparseCodes
    embeddings: Tensor
    error: Tensor
    energy: Tensor

    def __len__(self) -> int:
        return self.summaries.n_rows

    def take(self, rows: Tensor) -> TextEvidence:
        """The texts numbered `rows`."""
        return TextEvidence(self.summaries.take_rows(rows), self.embeddings[rows], self.error[rows], self.energy[rows])


class TopicUncertainty(TypedDict):
    """See the module. `aligned`, `mixed`, `unaligned`: of what is promoted, the share that goes through latents with
    twice the share in the topic's texts, between that and half, and at most half."""

    coverage: float
    topic_coverage: float
    contamination: float
    reconstruction_error: float
    aligned: float
    mixed: float
    unaligned: float
    uncertainty: float


class UncertaintyThreshold(NamedTuple):
    """threshold: the quantile of `values`, the uncertainties of topics made of reference texts.
    error: above which reconstruction error a topic is unlike the usual reference texts, see `usual_error`."""

    threshold: float
    quantile: float
    values: Tensor
    error: float


@torch.no_grad()
def reconstruction_sums(
    sae: SparseAutoencoder,
    hidden: Tensor,
    text_index: Tensor,
    n_texts: int,
    centre: Tensor,
    *,
    tokens_at_once: int = 2048,
) -> tuple[Tensor, Tensor]:
    """Sums of |x - SAE(x)|^2 and |x - centre|^2 over each text's tokens, (n_texts,) float64 each.

    Args:
        sae: writes where it reads.
        hidden: (n_tokens, d_in). text_index: (n_tokens,) int64.
        centre: (d_in,), the mean state of the reference texts.
    """
    if sae.config.d_in != sae.config.d_out or sae.config.hooks_out or centre.shape != hidden.shape[1:]:
        raise ValueError(
            f"Expected an SAE that reconstructs what it reads and a centre ({hidden.shape[1]},). "
            f"Received: d_in={sae.config.d_in}, d_out={sae.config.d_out}, centre {tuple(centre.shape)}."
        )
    sums = torch.zeros(2, n_texts, dtype=torch.float64)
    for states, texts in zip(hidden.split(tokens_at_once), text_index.cpu().split(tokens_at_once), strict=True):
        x = states.to(sae.device, sae.dtype)
        output = sae(x).reconstruction.double()
        error = (output - x.double()).square().sum(-1).cpu()
        energy = (x.double() - centre.to(x.device).double()).square().sum(-1).cpu()
        sums[0].index_add_(0, texts, error)
        sums[1].index_add_(0, texts, energy)
    return sums[0], sums[1]


def topic_selectivity(topic: SparseCodes, reference: SparseCodes) -> Tensor:
    """q of the module, (d_sae,) float64; NaN for latents that are active in neither."""
    inside, outside = (codes.sums() / codes.n_rows for codes in (topic, reference))
    return inside / (inside + outside)


def feature_kinds(selectivity: Tensor) -> list[str]:
    """`aligned`, `mixed` or `unaligned` for each latent, "" where the selectivity is NaN."""
    number = (selectivity > 1 - TWICE).long() + (selectivity >= TWICE).long()
    return ["" if nan else KINDS[i] for i, nan in zip(number.tolist(), selectivity.isnan().tolist(), strict=True)]


def topic_uncertainty(topic: TextEvidence, reference: TextEvidence, scores: Tensor) -> TopicUncertainty:
    """How little of a topic can be represented and told apart; 0 is certain, 1 is nothing.

    Args:
        topic, reference: of texts of one model, SAE and centre.
        scores: (d_sae,), 0 for latents that are active in no reference text.

    Raises:
        ValueError: shapes do not fit, or the states do not differ from the centre.
    """
    d_sae = reference.summaries.d_sae
    if scores.shape != (d_sae,) or topic.summaries.d_sae != d_sae or not len(topic) or not len(reference):
        raise ValueError(
            f"Expected texts of one SAE, and a score for each of its {d_sae} latents. Received: {len(topic)} texts of "
            f"{topic.summaries.d_sae}, {len(reference)} of {d_sae} latents, {tuple(scores.shape)} scores."
        )
    energy = float(topic.energy.sum())
    if not energy > 0:
        raise ValueError("The topic's states must differ from the mean reference state. Received: energy 0.")
    inside, outside = (evidence.summaries.sums() / len(evidence) for evidence in (topic, reference))
    scores = scores.double().nan_to_num(0.0)
    known = outside > 0
    usual = float((outside * scores).sum() / outside.sum())
    promoted = outside * (scores - usual).clamp(min=0)
    # Of equal scores nothing is promoted; then the usual activity says what is written.
    promoted = promoted if float(promoted.sum()) > 0 else outside
    promoted = promoted / promoted.sum()
    q = (inside / (inside + outside)).nan_to_num(0.0)  # latents active in neither have no weight
    contamination = float((promoted * (1 - q)).sum())
    shares = [float(promoted[place].sum()) for place in (q >= TWICE, (q > 1 - TWICE) & (q < TWICE), q <= 1 - TWICE)]
    coverage = float(known.double().mean())
    topic_coverage = float(inside[known].sum() / inside.sum()) if float(inside.sum()) > 0 else 0.0
    error = float(topic.error.sum()) / energy
    certainty = coverage * topic_coverage * (1 - contamination) * (1 - min(1.0, error))
    return {
        "coverage": coverage,
        "topic_coverage": topic_coverage,
        "contamination": contamination,
        "reconstruction_error": error,
        "aligned": shares[0],
        "mixed": shares[1],
        "unaligned": shares[2],
        "uncertainty": 1 - certainty,
    }


def calibrate_threshold(
    reference: TextEvidence,
    topic_size: int,
    score: Callable[[SparseCodes, Tensor], Tensor],
    distances: Callable[[Tensor, Tensor], Tensor],
    *,
    quantile: float = 0.95,
) -> UncertaintyThreshold:
    """Above which uncertainty a topic is worse represented than the reference texts represent each other.

    For each reference text, of the `2 topic_size` texts nearest to it (itself the first) every second one is held out
    as a topic of its own; all others are its reference, the other half of the neighbourhood among them. Of these
    topics a share `quantile` lies below the threshold.

    Args:
        reference: n texts.
        topic_size: texts of a topic; a quarter of the reference texts is taken at most.
        score: (summaries, distances) -> scores (d_sae,).
        distances: (embeddings (n, d), topic embeddings (m, d)) -> (n,).
        quantile: in (0, 1).

    Raises:
        ValueError: fewer than 1 / (1 - quantile) reference texts, of which no such quantile can be told; or a
            quantile out of range.
    """
    n = len(reference)
    if not 0 < quantile < 1 or topic_size < 1:
        raise ValueError(f"`quantile` must be in (0, 1). Received: quantile={quantile!r}, topic_size={topic_size!r}.")
    if n < (needed := max(4, math.ceil(round(1 / (1 - quantile), 9)))):
        raise ValueError(f"A {quantile:.0%} quantile needs {needed} reference texts. Received: {n}.")
    size = min(topic_size, n // 4)
    near = (reference.embeddings.double() @ reference.embeddings.double().T).fill_diagonal_(math.inf)
    values = []
    for order in near.argsort(dim=1, descending=True, stable=True):
        held, rest = order[: 2 * size : 2], torch.cat([order[1 : 2 * size : 2], order[2 * size :]]).sort().values
        topic, others = reference.take(held), reference.take(rest)
        scores = score(others.summaries, distances(others.embeddings, topic.embeddings))
        values.append(topic_uncertainty(topic, others, scores)["uncertainty"])
    found = torch.tensor(values, dtype=torch.float64)
    return UncertaintyThreshold(float(found.quantile(quantile)), quantile, found, usual_error(reference, quantile))


def usual_error(reference: TextEvidence, quantile: float = 0.95) -> float:
    """Below which reconstruction error a share `quantile` of the usual reference texts lie.

    exp(m + z 1.4826 median |l - m|),  l = log(error / energy) of each text, m = median l

    With z the normal quantile: the quantile of a log-normal distribution that is told by the texts' middle. Up to a
    third of the texts may be of kinds that are represented badly; a quantile of all of them is then these kinds' own.

    Raises:
        ValueError: no text has states that differ from the centre, or `quantile` is not in (0, 1).
    """
    there = reference.energy > 0
    if not 0 < quantile < 1 or not bool(there.any()):
        raise ValueError(
            f"Expected texts that differ from the mean state, and `quantile` in (0, 1). Received: "
            f"{int(there.sum())} of {len(reference)} texts, quantile={quantile!r}."
        )
    errors = (reference.error[there] / reference.energy[there]).double().clamp(min=LEAST_ERROR).log()
    middle = errors.quantile(0.5)
    spread = (errors - middle).abs().quantile(0.5) / NORMAL_MAD
    return float((middle + NormalDist().inv_cdf(quantile) * spread).exp())


# -- generations -----------------------------------------------------------------------------------------------------


class GenerationRow(TypedDict):
    """Measures of the texts of one method: means, `_error` their standard errors, `_change` against the unsteered
    texts of the same prompts. Similarity is the cosine to the nearest text of the topic."""

    similarity: float
    similarity_error: float
    similarity_change: float
    similarity_change_error: float
    perplexity: float
    acceptability: float
    acceptability_error: float
    repetition: float


def topic_similarity(embeddings: Tensor, topic: Tensor) -> Tensor:
    """Cosine of each text to the nearest text of a topic, (n,) float64.

    Args:
        embeddings: (n, d). topic: (m, d). Both of unit length.
    """
    return (embeddings.double() @ topic.double().T).amax(-1)


def generation_row(
    texts: Sequence[str], similarity: Tensor, unsteered: Tensor, acceptability: Tensor, perplexity: float
) -> GenerationRow:
    """Put the measures of a method's texts together.

    Args:
        texts: n.
        similarity, unsteered: (n,), to the topic, of these texts and of the unsteered ones; NaN for empty ones.
        acceptability: (n,), NaN where a text is too short to be judged.
        perplexity: of the texts under the unsteered model.

    Raises:
        ValueError: no text, or shapes that do not fit.
    """
    if not texts or not len(texts) == len(similarity) == len(unsteered) == len(acceptability):
        raise ValueError(
            f"Expected measures of n texts, n of at least 1. Received: {len(texts)} texts, {len(similarity)}, "
            f"{len(unsteered)} and {len(acceptability)} measures."
        )
    (mean, error), (change, change_error) = _mean_and_error(similarity), _mean_and_error(similarity - unsteered)
    judged, judged_error = _mean_and_error(acceptability)
    return {
        "similarity": mean,
        "similarity_error": error,
        "similarity_change": change,
        "similarity_change_error": change_error,
        "perplexity": perplexity,
        "acceptability": judged,
        "acceptability_error": judged_error,
        "repetition": repetition(texts),
    }


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Of those that are no NaN: the mean, and its standard error, 0 of a single one."""
    values = values.double()[~values.isnan()]
    if not len(values):
        return math.nan, math.nan
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
