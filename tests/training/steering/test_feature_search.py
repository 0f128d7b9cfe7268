"""Feature search: statistics against scikit-learn, output scores against the formula written out, selection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score, mutual_info_score

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.training.steering.effect_scores import delta_confidences, logit_lens_tokens, output_scores
from sae_transformers.training.steering.feature_search import (
    FeatureSearch,
    activity_information,
    best_of,
    held_out_f1,
    input_scores,
    labels_of_scores,
    mean_differences,
    search_features,
)
from sae_transformers.training.steering.settings import OutputScoreSettings, SearchSettings
from tests.create_training_data.words import word_tokenizer
from tests.tiny import ARCHITECTURES, tiny_model, tiny_sae

PROMPT = "w1 w2 w3"
NEUTRAL = OutputScoreSettings(prompt=PROMPT)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def table() -> tuple[torch.Tensor, torch.Tensor]:
    """(40, 64) codes, a third of them not zero, and labels; latent 5 follows the label, latent 6 its opposite."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.rand(40, 64, generator=draw) * (torch.rand(40, 64, generator=draw) < 0.3)
    labels = (torch.rand(40, generator=draw) < 0.4).long()
    codes[:, 5], codes[:, 6] = labels * 2.0, (1 - labels) * 2.0
    codes[:, 63] = 0
    return codes, labels


def test_statistics_are_those_of_scikit_learn(table: tuple) -> None:
    codes, labels = table
    sparse = SparseCodes.from_dense(codes)
    found = activity_information(sparse, labels)
    for latent in range(64):
        expected = mutual_info_score(labels.numpy(), (codes[:, latent] > 0).long().numpy())
        assert float(found[latent]) == pytest.approx(expected, abs=1e-12)
    difference = codes[labels == 1].double().mean(0) - codes[labels == 0].double().mean(0)
    assert torch.allclose(mean_differences(sparse, labels), difference, atol=1e-12)
    aurocs = input_scores(sparse, labels, "auroc")
    assert float(aurocs[7]) == pytest.approx(auroc(codes[:, 7], labels), abs=1e-12)
    signed = input_scores(sparse, labels, "mutual_information")
    entropy = mutual_info_score(labels.numpy(), labels.numpy())
    assert float(signed[5]) == pytest.approx(entropy) and float(signed[6]) == pytest.approx(-entropy)
    assert found[63] == 0 and float(aurocs[63]) == 0.5


def test_logit_lens_is_head_and_norm_of_the_decoder_row(model: Any) -> None:
    features = torch.tensor([3, 60])
    found = logit_lens_tokens(model, features, top=4, at_once=1)
    rows = model.saes[0].W_dec[features]
    logits = model.lm.lm_head(model.lm.model.norm(rows))
    assert torch.equal(found, logits.topk(4).indices)


@torch.no_grad()
def test_output_score_is_the_papers_formula(model: Any) -> None:
    tokenizer = word_tokenizer()
    features = torch.tensor([0, 9, 33, 63])
    found = output_scores(model, tokenizer, features, replace(NEUTRAL, top_tokens=5), rows_at_once=3)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    hidden = model(input_ids=ids, output_sae_inputs=True).sae_inputs[0]
    peak = float(model.saes[0].encode(hidden)[0, -1].max())
    for feature, score in zip(features.tolist(), found.tolist(), strict=True):
        edit = Steering([FeatureEdit(feature=feature, op="add", value=10 * peak)], positions="last_prompt")
        probabilities = model(input_ids=ids, steering=edit).logits[0, -1].double().softmax(-1)
        own = logit_lens_tokens(model, torch.tensor([feature]), top=5)[0]
        order = probabilities.argsort(descending=True).tolist()
        rank = min(order.index(token) for token in own.tolist())
        expected = (1 - rank / len(order)) * float(probabilities[own].max())
        assert score == pytest.approx(expected, rel=1e-4)
    assert ((found >= 0) & (found <= 1)).all()
    assert OutputScoreSettings().prompt == "From my experience,"


def test_a_latent_that_writes_a_tokens_unembedding_has_a_high_output_score() -> None:
    made = tiny_model(saes=[tiny_sae(layer=2, site="resid_post")]).eval()
    with torch.no_grad():
        made.lm.lm_head.weight[50] *= 5
        made.saes[0].W_dec[7] = made.lm.lm_head.weight[50]
    scores = output_scores(made, word_tokenizer(), torch.arange(64), NEUTRAL)
    assert float(scores[7]) > 0.99 and scores.argmax() == 7


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "phi", "bloom", "stablelm", "gemma2"])
def test_every_family_has_a_final_norm(architecture: str) -> None:
    made = tiny_model(architecture).eval()
    assert architecture in ARCHITECTURES
    assert logit_lens_tokens(made, torch.tensor([1]), top=3).shape == (1, 3)


def standard(values: torch.Tensor) -> torch.Tensor:
    """Standard scores, by numpy's definition of the deviation."""
    return (values - values.mean()) / values.numpy().std()


def test_selection(model: Any, table: tuple) -> None:
    codes, labels = table
    sparse, tokenizer = SparseCodes.from_dense(codes), word_tokenizer()
    by_input = search_features(sparse, labels, settings=SearchSettings(selection="input", pool=8))
    aurocs = input_scores(sparse, labels)
    assert by_input.features[0] == 5 and by_input.output_scores is None and len(by_input.features) == 8
    assert by_input.input_scores.tolist() == sorted(by_input.input_scores.tolist(), reverse=True)
    assert (
        6 not in search_features(sparse, labels, settings=SearchSettings(selection="input", pool=64)).features
    )  # speaks against
    by_output = search_features(
        sparse, labels, model, tokenizer, SearchSettings(selection="output", pool=8), effect=NEUTRAL
    )
    assert set(by_output.features.tolist()) == set(by_input.features.tolist())
    effect = output_scores(model, tokenizer, by_output.features, NEUTRAL)
    assert by_output.output_scores is not None
    assert torch.allclose(by_output.output_scores, effect) and bool((effect.diff() <= 0).all())
    both = search_features(sparse, labels, model, tokenizer, SearchSettings(pool=8), effect=NEUTRAL)
    assert both.output_scores is not None
    summed = standard(both.input_scores) + standard(both.output_scores)
    assert bool((summed.diff() <= 1e-12).all()) and set(both.features.tolist()) == set(by_input.features.tolist())
    row = both.rows()[0]
    assert row["auroc"] == float(aurocs[int(row["feature"])]) and set(row) == {
        "sae",
        "feature",
        "auroc",
        "output_score",
    }


@torch.no_grad()
def test_a_latent_that_answers_far_best_is_first_by_both_though_its_decoder_row_names_no_token(table: tuple) -> None:
    """A trained latent of a diffuse concept has no token of its own, so an output score near 0 as most latents have
    (84 % of a pool of SmolLM2's), and was put after those that answer little better than chance."""
    codes, labels = table
    made = tiny_model(saes=[tiny_sae(layer=2, site="resid_post")]).eval()
    pool = search_features(
        SparseCodes.from_dense(codes), labels, settings=SearchSettings(selection="input", pool=8)
    ).features
    assert pool[0] == 5
    made.saes[0].W_dec.mul_(1e-3)
    sayers = pool[4:].tolist()  # these say a token each
    for token, latent in enumerate(sayers, start=50):
        made.saes[0].W_dec[latent] = 20 * made.lm.lm_head.weight[token]
    found = search_features(
        SparseCodes.from_dense(codes), labels, made, word_tokenizer(), SearchSettings(pool=8),
        effect=replace(NEUTRAL, top_tokens=1),
    )  # fmt: skip
    assert found.output_scores is not None
    own = dict(zip(found.features.tolist(), found.output_scores.tolist(), strict=True))
    assert own[5] < 0.01 and min(own[latent] for latent in sayers) > 0.3
    assert found.features[0] == 5
    assert set(found.features[1:5].tolist()) == set(sayers)  # and of latents that answer alike, those that say it


@torch.no_grad()
def test_selection_by_effect(model: Any, table: tuple) -> None:
    codes, labels = table
    sparse, tokenizer = SparseCodes.from_dense(codes), word_tokenizer()
    correlations = torch.rand(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1
    pool = search_features(sparse, labels, settings=SearchSettings(selection="input", pool=8)).features
    confidences = delta_confidences(model, tokenizer, pool, NEUTRAL)
    merits = {
        "confidence": confidences.abs(),
        "correlation": correlations[pool],
        "effect": standard(confidences.abs()) + standard(correlations[pool]),
    }
    for selection, merit in merits.items():
        found = search_features(
            sparse,
            labels,
            model,
            tokenizer,
            SearchSettings(selection=selection, pool=8),
            effect=NEUTRAL,
            correlations=correlations,
        )
        order = merit.argsort(descending=True)
        assert found.features.tolist() == pool[order].tolist() and found.output_scores is None
        names = {"confidence": {"delta_confidence"}, "correlation": {"correlation"}}
        expected = names.get(selection, {"delta_confidence", "correlation"})
        assert set(found.rows()[0]) == {"sae", "feature", "auroc"} | expected
        if found.delta_confidences is not None:
            assert torch.allclose(found.delta_confidences, confidences[order])
        if found.correlations is not None:
            assert torch.equal(found.correlations, correlations[pool][order])
    same = search_features(
        sparse,
        labels,
        model,
        tokenizer,
        SearchSettings(selection="effect", pool=8),
        effect=NEUTRAL,
        correlations=torch.ones(64),
    )
    assert same.features.tolist() == pool[confidences.abs().argsort(descending=True)].tolist()


def test_best_of_several_saes_take_turns() -> None:
    one, other = (
        FeatureSearch(torch.tensor(ids), torch.zeros(len(ids)), None, "auroc", "input", sae)
        for sae, ids in ((0, [5, 6, 7]), (1, [9]))
    )
    assert best_of([one, other], 2) == [(0, 5), (1, 9), (0, 6)]


def test_held_out_f1() -> None:
    draw = torch.Generator().manual_seed(1)
    labels = (torch.rand(200, generator=draw) < 0.5).long()
    scores = labels + 0.8 * torch.randn(200, generator=draw)
    found = held_out_f1(scores, labels, seed=3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    first, second = order[:100], order[100:]
    best = max(f1_score(labels[first], scores[first] > t) for t in [*scores[first].tolist(), -99.0])
    assert f1_score(labels[first], scores[first] > found.threshold) == pytest.approx(best)
    assert found.f1 == pytest.approx(f1_score(labels[second], scores[second] > found.threshold))
    assert held_out_f1(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])).f1 != held_out_f1(scores, labels).f1


def test_labels_from_a_judge() -> None:
    assert labels_of_scores(torch.tensor([0.1, 0.9, 0.5])).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="1 that are not"):
        labels_of_scores(torch.tensor([0.1, float("nan")]))
    with pytest.raises(ValueError, match="2 with, 0 without"):
        labels_of_scores(torch.tensor([0.8, 0.9]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": torch.zeros(40)}, "0 with, 40 without"),
        ({"labels": torch.ones(40)}, "40 with, 0 without"),
        ({"labels": torch.ones(3)}, "40 rows"),
        ({"labels": torch.full((40,), 2)}, "40 neither"),
        ({"statistic": "auc"}, "statistic='auc'"),
        ({"selection": "all"}, "selection='all'"),
        ({"pool": 0}, "pool=0"),
        ({"selection": "output"}, "needs `model`"),
        ({"selection": "confidence"}, "needs `model`"),
        ({"selection": "correlation"}, "selection='correlation', correlations=None"),
        ({"outcome_samples": 0}, "outcome_samples=0"),
    ],
)
def test_what_is_refused(table: tuple, change: dict, told: str) -> None:
    codes, labels = table
    given = change.pop("labels", labels)
    with pytest.raises(ValueError, match=told):
        settings = SearchSettings(**{"selection": "input", **change})
        search_features(SparseCodes.from_dense(codes), given, settings=settings)


def test_features_of_another_sae_are_refused(model: Any, table: tuple) -> None:
    codes, labels = table
    other = SparseCodes.from_dense(torch.cat([codes, codes], 1))
    with pytest.raises(ValueError, match="which has 64 latents. Received: codes of 128"):
        search_features(other, labels, model, word_tokenizer(), SearchSettings(selection="output"))
    with pytest.raises(ValueError, match="Received: 3 to 64"):
        output_scores(model, word_tokenizer(), torch.tensor([3, 64]))
    with pytest.raises(ValueError, match="SAEs 0 to 0. Received: SAE 1"):
        output_scores(model, word_tokenizer(), torch.tensor([3]), sae=1)
    with pytest.raises(ValueError, match=r"needs `correlations` of 64 latents.*correlations=\(65,\)"):
        settings = SearchSettings(selection="correlation")
        search_features(SparseCodes.from_dense(codes), labels, settings=settings, correlations=torch.ones(65))
    with pytest.raises(ValueError, match="No latent is more active"):
        search_features(SparseCodes.from_dense(codes[:, 6:7]), labels, settings=SearchSettings(selection="input"))
