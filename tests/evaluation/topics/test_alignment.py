"""Uncertainty of a topic: numbers worked out by hand, and topics that an SAE represents worse and worse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.evaluation.topics.alignment import (
    TextEvidence,
    calibrate_threshold,
    feature_kinds,
    generation_row,
    reconstruction_sums,
    topic_selectivity,
    topic_similarity,
    topic_uncertainty,
    usual_error,
)
from sae_transformers.latents.sparse_codes import SparseCodes, stack_rows
from sae_transformers.training.steering.topic_scores import prompt_summaries, topic_distances, topic_scores
from tests.tiny import tiny_sae

F64 = torch.float64
CLUSTERS, DIMENSIONS = 8, 16  # the SAE knows these of 32


def evidence(summaries: list[list[float]], error: list[float], energy: list[float]) -> TextEvidence:
    codes = SparseCodes.from_dense(torch.tensor(summaries, dtype=F64))
    return TextEvidence(codes, torch.eye(len(summaries)), torch.tensor(error), torch.tensor(energy))


def test_by_hand() -> None:
    reference = evidence([[0.5, 0.5, 0, 0, 0], [0.5, 0.1, 0.4, 0, 0]], [1, 1], [4, 4])
    topic = evidence([[0.6, 0, 0.2, 0.2, 0]], [1], [4])
    found = topic_uncertainty(topic, reference, torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0], dtype=F64))
    # m(R) = .5 .3 .2 0 0; m(T) = .6 0 .2 .2 0; the usual score is .25 + .2 = .45; promoted .5*.05 and .2*.55
    q0, q2, w0, w2 = 0.6 / 1.1, 0.5, 0.025, 0.11
    contamination = (w0 * (1 - q0) + w2 * (1 - q2)) / (w0 + w2)
    expected = {
        "coverage": 0.6,
        "topic_coverage": 0.8,
        "contamination": contamination,
        "reconstruction_error": 0.25,
        "aligned": 0.0,
        "mixed": 1.0,
        "unaligned": 0.0,
        "uncertainty": 1 - 0.6 * 0.8 * (1 - contamination) * 0.75,
    }
    assert found == pytest.approx(expected, abs=1e-12)
    selectivity = topic_selectivity(topic.summaries, reference.summaries)
    assert selectivity[:4].tolist() == pytest.approx([q0, 0, q2, 1]) and math.isnan(selectivity[4])
    assert feature_kinds(selectivity) == ["mixed", "unaligned", "mixed", "aligned", ""]
    assert feature_kinds(torch.tensor([2 / 3, 1 / 3, 0.34, 0.66], dtype=F64)) == [
        "aligned", "unaligned", "mixed", "mixed"
    ]  # fmt: skip


def test_equal_scores_promote_what_is_usual_and_an_error_beyond_one_counts_as_one() -> None:
    reference = evidence([[0.5, 0.5]], [1], [4])
    found = topic_uncertainty(evidence([[1.0, 0]], [9], [4]), reference, torch.ones(2))
    assert found["contamination"] == pytest.approx(0.5 * (1 - 2 / 3) + 0.5)
    assert found["reconstruction_error"] == 2.25 and found["uncertainty"] == 1


def test_reconstruction_sums_equal_dense_ones() -> None:
    sae, texts = tiny_sae(layer=0), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    centre = torch.linspace(-1, 1, 32)
    error, energy = reconstruction_sums(sae, hidden, texts, 3, centre, tokens_at_once=3)
    with torch.no_grad():
        off = (sae(hidden).reconstruction - hidden).double().square().sum(-1)
    far = (hidden - centre).double().square().sum(-1)
    for text in range(3):
        assert float(error[text]) == pytest.approx(float(off[texts == text].sum()), rel=1e-5)
        assert float(energy[text]) == pytest.approx(float(far[texts == text].sum()), rel=1e-5)


# -- topics that are represented worse and worse ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    """Reconstructs the first `DIMENSIONS` of 32 dimensions exactly where at most four are positive, others not."""
    config = SparseAutoencoderConfig(d_in=32, d_sae=DIMENSIONS, activation="topk", k=4, layer=0)
    found = SparseAutoencoder(config, dtype=F64)
    with torch.no_grad():
        found.W_dec.copy_(torch.eye(DIMENSIONS, 32))
        found.W_enc.copy_(found.W_dec.T)
    return found


def made(
    sae: SparseAutoencoder,
    members: list[int],
    seed: int,
    *,
    meaning: list[int] | None = None,
    outside: float = 0.0,
    dimensions: int = DIMENSIONS,
) -> TextEvidence:
    """Texts of 12 tokens, text i of the cluster members[i], which has two dimensions of its own and shares the others.

    meaning: the cluster that a sentence embedding would put each text into. outside: the share of each state that
    lies in dimensions unknown to the SAE. dimensions: among which the shared ones are.
    """
    draw = torch.Generator().manual_seed(seed)
    states, index = [], []
    for text, cluster in enumerate(members):
        tokens = torch.zeros(12, 32, dtype=F64)
        own = torch.tensor([2 * cluster, 2 * cluster + 1])
        tokens[:, own] = 1 + torch.rand(12, 2, dtype=F64, generator=draw)
        shared = torch.randint(dimensions, (12, 1), generator=draw)
        tokens.scatter_add_(1, shared, torch.rand(12, 1, dtype=F64, generator=draw))
        tokens = math.sqrt(1 - outside) * tokens + math.sqrt(outside) * tokens.roll(DIMENSIONS, dims=1)
        states.append(tokens)
        index.append(torch.full((12,), text))
    hidden, texts = torch.cat(states), torch.cat(index)
    noise = 0.1 * torch.randn(len(members), CLUSTERS, dtype=F64, generator=draw)
    embeddings = torch.nn.functional.normalize(torch.eye(CLUSTERS, dtype=F64)[meaning or members] + noise, dim=-1)
    sums = reconstruction_sums(sae, hidden, texts, len(members), torch.full((32,), 0.2, dtype=F64))
    return TextEvidence(prompt_summaries(sae, hidden, texts, len(members)), embeddings, *sums)


def scores_of(summaries: SparseCodes, distances: Tensor) -> Tensor:
    return topic_scores(summaries, distances).scores


@pytest.fixture(scope="module")
def reference(sae: SparseAutoencoder) -> TextEvidence:
    return made(sae, [text % CLUSTERS for text in range(64)], seed=0)


def uncertainty(topic: TextEvidence, reference: TextEvidence) -> float:
    scores = scores_of(reference.summaries, topic_distances(reference.embeddings, topic.embeddings))
    return topic_uncertainty(topic, reference, scores)["uncertainty"]


def test_states_beyond_the_span_of_the_sae_are_more_uncertain(sae, reference) -> None:
    limit = calibrate_threshold(reference, 8, scores_of, topic_distances).threshold
    shares = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    found = [uncertainty(made(sae, [3] * 8, seed=7, outside=share), reference) for share in shares[:-1]]
    assert all(after > before + 0.01 for before, after in zip(found, found[1:], strict=False)), found
    assert found[0] <= limit < found[3]
    with pytest.raises(ValueError, match="No latent of the SAE is active"):
        made(sae, [3] * 8, seed=7, outside=shares[-1])


def test_a_topic_whose_latents_no_reference_text_has_is_more_uncertain(sae) -> None:
    known = made(sae, [text % 6 for text in range(48)], seed=0, dimensions=12)  # of clusters 6 and 7 nothing is known
    limit = calibrate_threshold(known, 8, scores_of, topic_distances).threshold
    inside = uncertainty(made(sae, [3] * 8, seed=7, dimensions=12), known)
    outside = uncertainty(made(sae, [6] * 8, seed=7, meaning=[3] * 8, dimensions=12), known)
    assert inside <= limit < outside


def test_a_topic_that_embeddings_put_elsewhere_is_more_uncertain(sae, reference) -> None:
    """The latents that are promoted are not those that the topic has: contamination alone tells."""
    limit = calibrate_threshold(reference, 8, scores_of, topic_distances).threshold
    right, wrong = (made(sae, [3] * 8, seed=7, meaning=[cluster] * 8) for cluster in (3, 5))
    assert uncertainty(right, reference) <= limit < uncertainty(wrong, reference)
    told = []
    for topic in (right, wrong):
        scores = scores_of(reference.summaries, topic_distances(reference.embeddings, topic.embeddings))
        told.append(topic_uncertainty(topic, reference, scores))
    assert told[0]["reconstruction_error"] == pytest.approx(told[1]["reconstruction_error"])
    assert told[0]["aligned"] > 0.9 and told[1]["unaligned"] > 0.9


def test_the_threshold_is_a_quantile_of_topics_made_of_reference_texts(reference) -> None:
    found = calibrate_threshold(reference, 8, scores_of, topic_distances, quantile=0.8)
    assert len(found.values) == 64 and found.threshold == pytest.approx(float(found.values.quantile(0.8)))
    again = calibrate_threshold(reference, 8, scores_of, topic_distances, quantile=0.8)
    assert torch.equal(again.values, found.values)
    # The topic of the first text, made by hand.
    near = (reference.embeddings @ reference.embeddings[0]).argsort(descending=True)[:16:2]
    assert near[0] == 0
    rest = torch.tensor([text for text in range(64) if text not in near.tolist()])
    assert float(found.values[0]) == pytest.approx(uncertainty(reference.take(near), reference.take(rest)))
    large = calibrate_threshold(reference, 500, scores_of, topic_distances)  # a quarter of the texts at most
    assert len(large.values) == 64


def test_the_usual_error_is_a_log_normal_quantile_that_few_texts_do_not_move() -> None:
    """By hand: errors e^-1, 1 and e of energy 1 have the median 1 and a median distance of 1 in logarithms."""
    found = usual_error(evidence([[1.0]] * 3, [math.exp(-1), 1.0, math.e], [1.0] * 3), 0.975)
    assert found == pytest.approx(math.exp(1.959964 * 1.482602), rel=1e-5)
    draw = torch.Generator().manual_seed(0)
    errors = (0.1 * torch.randn(400, dtype=F64, generator=draw) - 1).exp()
    half = [[1.0]] * 400, [1.0] * 400
    clean = usual_error(evidence(half[0], errors.tolist(), half[1]))
    assert clean == pytest.approx(math.exp(-1 + 1.644854 * 0.1), rel=0.02)
    errors[:80] *= 2  # a fifth of a kind that is represented half as well
    assert usual_error(evidence(half[0], errors.tolist(), half[1])) < 1.12 * clean
    assert float(errors.quantile(0.95)) > 1.7 * clean


@pytest.mark.parametrize("count", [0, 4, 8, 13])
def test_a_bad_kind_among_the_reference_texts_does_not_pass_for_usual(sae, count: int) -> None:
    """Found on code: reference texts of its own kind make its contamination small and the quantile large."""
    members = [text % 6 for text in range(64 - count)]
    good, bad = made(sae, members, seed=0, outside=0.1), [7] * (count or 1)
    odd = made(sae, bad, seed=1, outside=0.5)
    parts = [good, odd] if count else [good]
    codes = stack_rows([part.summaries for part in parts])
    rest = [torch.cat([getattr(part, name) for part in parts]) for name in ("embeddings", "error", "energy")]
    mixed = TextEvidence(codes, *rest)
    limits = calibrate_threshold(mixed, 8, scores_of, topic_distances)
    known, unknown = made(sae, [3] * 8, seed=7, outside=0.1), made(sae, [7] * 8, seed=8, outside=0.5)
    told = []
    for topic in (known, unknown):
        scores = scores_of(mixed.summaries, topic_distances(mixed.embeddings, topic.embeddings))
        told.append(topic_uncertainty(topic, mixed, scores))
    assert told[0]["reconstruction_error"] < limits.error < told[1]["reconstruction_error"]
    assert told[0]["uncertainty"] <= limits.threshold
    if count == 13:
        assert told[1]["uncertainty"] <= limits.threshold  # the quantile alone lets it pass


def test_bad_input(reference) -> None:
    with pytest.raises(ValueError, match="0 of 64 texts, quantile=0.95"):
        usual_error(replace(reference, energy=torch.zeros(64)))
    with pytest.raises(ValueError, match="A 95% quantile needs 20 reference texts. Received: 19"):
        calibrate_threshold(reference.take(torch.arange(19)), 5, scores_of, topic_distances)
    calibrate_threshold(reference.take(torch.arange(20)), 5, scores_of, topic_distances)
    for size, quantile, told in ((5, 1.0, "quantile=1.0"), (0, 0.95, "topic_size=0")):
        with pytest.raises(ValueError, match=told):
            calibrate_threshold(reference, size, scores_of, topic_distances, quantile=quantile)
    with pytest.raises(ValueError, match=r"64 of 16 latents, \(3,\) scores"):
        topic_uncertainty(reference, reference, torch.ones(3))
    flat = replace(reference, energy=torch.zeros(64))
    with pytest.raises(ValueError, match="Received: energy 0"):
        topic_uncertainty(flat, reference, torch.ones(16))
    with pytest.raises(ValueError, match=r"centre \(31,\)"):
        reconstruction_sums(tiny_sae(layer=0), torch.ones(2, 32), torch.tensor([0, 1]), 2, torch.ones(31))


# -- generations ------------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_to_the_nearest() -> None:
    topic = torch.eye(3)[:2]
    found = topic_similarity(torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]), topic)
    assert found.tolist() == pytest.approx([0.8, 0.0])


def test_a_row_of_means_and_standard_errors() -> None:
    unsteered = torch.tensor([0.1, 0.2, 0.3, math.nan])
    similarity = torch.tensor([0.2, 0.2, 0.6, 0.5])
    accepted = torch.tensor([1.0, math.nan, 3.0, 2.0])
    row = generation_row(["a b c a b c", "b", "c", "d"], similarity, unsteered, accepted, 7.0)
    change = torch.tensor([0.1, 0.0, 0.3], dtype=F64)
    assert row["similarity"] == pytest.approx(0.375) and row["perplexity"] == 7.0
    assert row["similarity_change"] == pytest.approx(float(change.mean()), abs=1e-7)
    assert row["similarity_change_error"] == pytest.approx(float(change.std()) / 3**0.5, abs=1e-7)
    assert row["acceptability"] == 2.0 and row["acceptability_error"] == pytest.approx(1 / 3**0.5)
    assert row["repetition"] == pytest.approx(1 / 16)
    alone = generation_row(["a"], torch.tensor([0.5]), torch.tensor([0.5]), torch.tensor([math.nan]), 1.0)
    assert alone["similarity_error"] == 0 and math.isnan(alone["acceptability"])
    with pytest.raises(ValueError, match="Received: 0 texts"):
        generation_row([], unsteered, unsteered, unsteered, 1.0)
    with pytest.raises(ValueError, match="1 texts, 4"):
        generation_row(["a"], unsteered, unsteered, unsteered, 1.0)
