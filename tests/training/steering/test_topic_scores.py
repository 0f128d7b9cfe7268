"""Scores of latents from reference texts, their tables, and the steering made of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, FeatureReweighting, SparseAutoencoder, SparseAutoencoderConfig, Steering
from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.training.steering.topic_scores import (
    METHODS,
    prompt_summaries,
    read_topic_scores,
    topic_distances,
    topic_scores,
    topic_steering,
    write_topic_scores,
)
from tests.tiny import tiny_model, tiny_sae

F64 = torch.float64
TEXTS = torch.tensor([0, 0, 2, 1, 1, 1, 0, 2])


def states(n: int = 8) -> Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(0))


def unit(rows: int, seed: int) -> Tensor:
    found = torch.randn(rows, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(found, dim=-1)


@pytest.mark.parametrize("summary", ["avg", "max", "counts"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_summaries_equal_the_formulas(summary: str, activation: str) -> None:
    sae = tiny_sae(activation=activation, layer=0)
    found = prompt_summaries(sae, states(), TEXTS, 3, summary=summary, tokens_at_once=3).to_dense()
    latents = sae.encode(states()).double()
    for text in range(3):
        mine = latents[text == TEXTS]
        whole = {"avg": mine.sum(0), "max": mine.amax(0), "counts": (mine > 0).double().sum(0)}[summary]
        torch.testing.assert_close(found[text], whole / whole.sum(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=F64))


def test_a_text_without_an_active_latent_weighs_nothing() -> None:
    sae = tiny_sae(activation="relu", layer=0)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
    hidden = torch.stack([states(1)[0] * 20, sae.b_dec.detach()])  # of the second text the code is 0
    found = prompt_summaries(sae, hidden, torch.tensor([0, 1]), 2)
    assert found.to_dense().sum(1).tolist() == pytest.approx([1, 0])
    with pytest.raises(ValueError, match="No latent of the SAE is active in any text. Received: 1 texts, coverage 0"):
        prompt_summaries(sae, hidden[1:], torch.tensor([0]), 1)


def test_distances_to_the_nearest() -> None:
    texts, topic = unit(6, 1), unit(3, 2)
    found = topic_distances(texts, topic)
    cosines = (texts @ topic.T).amax(1)
    torch.testing.assert_close(found.square(), 2 * (1 - cosines))
    assert float(topic_distances(topic, topic).max()) == 0


def test_a_latent_of_one_text_costs_its_squared_distance() -> None:
    summaries = torch.rand(4, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    summaries[:, 2] = torch.tensor([0, 0.3, 0, 0])
    distances = torch.tensor([0.5, 0.9, 1.1, 0.2], dtype=F64)
    found = topic_scores(SparseCodes.from_dense(summaries), distances)
    assert float(found.costs[2]) == pytest.approx(0.81, abs=1e-15)
    assert float(found.scores.max()) == 1 and float(found.scores.min()) == 0
    scaled = topic_scores(SparseCodes.from_dense(summaries), distances * 1.7)
    torch.testing.assert_close(scaled.scores, found.scores, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("summaries", "distances", "told"),
    [
        ([[0.5, 0.5]], [0.7], "1 reference texts, 2 active latents, all of one cost"),
        ([[0.5, 0.5], [1.0, 0.0]], [0.7, 0.7], "2 reference texts, 2 active latents, all of one cost"),
        ([[0.5, 0.5], [1.0, 0.0]], [0.7, math.nan], "1 of them not finite"),
        ([[0.5, 0.5], [1.0, 0.0]], [0.7, -1.0], "1 of them not finite or negative"),
        ([[0.5, 0.5], [1.0, 0.0]], [0.7], r"each of 2 texts. Received: \(1,\)"),
    ],
)
def test_scores_need_texts_that_differ(summaries: list, distances: list, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        topic_scores(SparseCodes.from_dense(torch.tensor(summaries)), torch.tensor(distances))


def test_bad_input() -> None:
    sae = tiny_sae(layer=0)
    with pytest.raises(ValueError, match="avg, max, counts. Received: summary='mean'"):
        prompt_summaries(sae, states(), TEXTS, 3, summary="mean")
    with pytest.raises(ValueError, match="1 of them without a token"):
        prompt_summaries(sae, states(), TEXTS, 4)
    signed = tiny_sae(activation="abs_topk", layer=0)
    with pytest.raises(ValueError, match="activation='abs_topk' with negative ones"):
        prompt_summaries(signed, states(), TEXTS, 3)
    with pytest.raises(ValueError, match=r"Received: \(3, 5\) and \(0, 5\)"):
        topic_distances(unit(3, 0), unit(0, 0))
    with pytest.raises(ValueError, match="must be finite"):
        topic_distances(unit(3, 0) * math.nan, unit(1, 0))


# -- steering ---------------------------------------------------------------------------------------------------------


SCORES = torch.tensor([math.nan, 0.25, 1.0, 0.0, 0.5, 0.5], dtype=F64)


@pytest.mark.parametrize("keep", [True, False])
def test_each_method_as_edits(keep: bool) -> None:
    places = {"keep_error": keep, "positions": [(1, None)]}
    made = {method: topic_steering(method, SCORES, keep_error=keep, top=3, sae=1) for method in METHODS}
    assert made["orig"] == Steering()
    assert made["SAE"] == (Steering() if keep else Steering(reconstruct=(1,), **places))
    added = [FeatureEdit(1, feature, "add", 10.0) for feature in (2, 4, 5)]
    assert made["clamp"] == Steering(added, **places)
    plain = (0.0, 0.25, 1.0, 0.0, 0.5, 0.5)
    assert made["swap"] == Steering([FeatureReweighting(1, plain, "swap")], **places)
    assert made["weight"] == Steering([FeatureReweighting(1, plain, "weight")], **places)
    assert all(Steering.from_json(one.to_json()) == one for one in made.values())
    (edit,) = topic_steering("swap", SCORES, strength=2.0).reweightings
    assert edit.scores == (0.0, 0.0625, 1.0, 0.0, 0.25, 0.25)
    (legacy,) = topic_steering("weight", SCORES, legacy=True, positions="all").reweightings
    assert legacy.legacy


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("swop", {}, "orig, SAE, clamp, weight, swap. Received: method='swop'"),
        ("swap", {"strength": -1.0}, "strength=-1.0"),
        ("clamp", {"top": 0}, "top=0"),
        ("clamp", {"top": 5}, "a score above 0, 4. Received: top=5"),
        ("swap", {"scores": torch.full((4,), math.nan)}, "none above 0"),
        ("swap", {"scores": torch.tensor([1.0, -0.5])}, r"scores\[1\]=-0.5"),
        ("swap", {"scores": torch.tensor([1.0, math.inf])}, r"scores\[1\]=inf"),
        ("weight", {"scores": torch.ones(2, 2)}, r"\(2, 2\)"),
    ],
)
def test_mistakes_in_steering(method: str, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        topic_steering(method, options.pop("scores", SCORES), **options)


def logits(model, steering) -> Tensor:
    ids = torch.arange(3, 12).view(1, -1)
    with torch.no_grad():
        return model(ids, steering=steering).logits


def test_in_a_model_the_first_token_is_left_alone_and_equal_scores_change_nothing() -> None:
    model = tiny_model(saes=[tiny_sae(dtype=F64, layer=1)], dtype=F64)
    scores = torch.rand(64, generator=torch.Generator().manual_seed(5))
    plain = logits(model, False)
    for method in METHODS[1:]:
        moved = logits(model, topic_steering(method, scores, keep_error=False))
        assert torch.equal(moved[:, 0], plain[:, 0]) and not torch.allclose(moved[:, 1:], plain[:, 1:])
    sae = logits(model, topic_steering("SAE", scores))
    for given, strength in ((scores, 0.0), (torch.full((64,), 0.3), 1.0)):
        swapped = topic_steering("swap", given, strength=strength)
        torch.testing.assert_close(logits(model, swapped), sae, rtol=0, atol=1e-12)
        kept = topic_steering("swap", given, keep_error=True, strength=strength)
        torch.testing.assert_close(logits(model, kept), plain, rtol=0, atol=1e-12)


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    summaries = torch.rand(5, 40, dtype=F64, generator=torch.Generator().manual_seed(3))
    summaries[:, 7] = 0
    scores = topic_scores(SparseCodes.from_dense(summaries), torch.linspace(0.2, 1, 5))
    path = write_topic_scores(tmp_path / "new" / f"scores.{ending}", scores, {"kind": ["mixed"] * 40})
    found = read_topic_scores(path, 40)
    assert torch.equal(found.scores, scores.scores) and torch.equal(found.costs.isnan(), scores.costs.isnan())
    assert torch.equal(found.costs.nan_to_num(), scores.costs.nan_to_num())
    assert found.coverage == scores.coverage == 39 / 40
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tables_of_others(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(",med.train_20.csv\n0,0.5\n1,\n2,nan\n3,1.0\n", encoding="utf-8")
    found = read_topic_scores(path)
    assert found.scores.tolist() == [0.5, 0, 0, 1] and found.scored.tolist() == [True, False, False, True]
    path.write_text("feature,score\n2,0.5\n0,1\n1,0\n", encoding="utf-8")
    assert read_topic_scores(path, 3).scores.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("feature,score\n0,0.5\n", "each of 2 latents; is the table of another SAE"),
        ("feature,score\n0,0.5\n1,2\n", "Received: 1 and 2.0 in row 1"),
        ("feature,score\n0,0.5\n7,1\n", "Received: 7 and 1.0 in row 1"),
        ("feature,score\n0,0.5\n1,high\n", "Received: 'high'"),
        ("feature,one,two\n0,0.5,1\n1,0,1\n", r"columns \['feature', 'one', 'two'\]"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        read_topic_scores(path, 2)


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    scores = topic_scores(SparseCodes.from_dense(torch.eye(3)), torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        write_topic_scores(tmp_path / "scores.csv", scores, {"kind": ["a"]})
    assert not list(tmp_path.iterdir())
    for act in (lambda: write_topic_scores(tmp_path / "scores.txt", scores), lambda: read_topic_scores("scores.txt")):
        with pytest.raises(ValueError, match="Received: 'scores.txt'"):
            act()
    with write_topic_scores(tmp_path / "scores.csv", scores).open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["feature", "score", "cost"]


def test_no_dense_matrix_of_texts_and_latents_is_made() -> None:
    """16 texts, 131,072 latents: what is held stays far below n x d_sae."""
    config = SparseAutoencoderConfig(d_in=4, d_sae=1 << 17, activation="topk", k=2, layer=0)
    sae = SparseAutoencoder(config)
    hidden = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    found = prompt_summaries(sae, hidden, torch.arange(32) // 2, 16, tokens_at_once=4)
    assert len(found.values) <= 64
    assert topic_scores(found, torch.linspace(0.1, 1, 16)).coverage <= 64 / (1 << 17)
