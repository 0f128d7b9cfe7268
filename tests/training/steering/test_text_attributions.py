"""What latents do to labelled texts, against attributions of one text at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers.evaluation.attribution.effects import gradient_effects
from sae_transformers.evaluation.attribution.targets import Target
from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.training.steering.feature_search import search_features
from sae_transformers.training.steering.settings import SearchSettings
from sae_transformers.training.steering.text_attributions import text_attributions
from tests.evaluation.attribution.worlds import random_model
from tests.tiny import prompt

ROWS = [prompt(1, length, seed=length)[0].tolist() for length in (9, 4, 7, 2, 6)]
LABELS = torch.tensor([1, 0, 0, 1, 0])


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


@pytest.mark.parametrize("tokens_at_once", [9, 64])
def test_they_are_those_of_each_text(model: Any, tokens_at_once: int) -> None:
    expected = [torch.zeros(64, dtype=torch.float64) for _ in range(2)]
    for row, label in zip(ROWS, LABELS.tolist(), strict=True):

        def likelihood(output: Any, row: list[int] = row) -> torch.Tensor:
            found = output.logits[:, :-1].log_softmax(-1)[:, torch.arange(len(row) - 1), torch.tensor(row[1:])]
            return found.mean(1)

        pairs, effect, _ = gradient_effects(model, Target("text", row, likelihood, {}), [0, 1])
        share = 1 / 2 if label else -1 / 3
        for number in (0, 1):
            own = pairs.sae == number
            expected[number].index_add_(0, pairs.feature[own], share * effect[own])
    seen = []
    found = text_attributions(model, ROWS, LABELS, tokens_at_once=tokens_at_once, report=seen.append)
    assert sum(seen) == len(ROWS) and len(seen) == (4 if tokens_at_once == 9 else 1)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_they_order_the_candidates(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.rand(20, 64, generator=draw)
    labels = (torch.arange(20) < 8).long()
    scores = torch.randn(64, generator=draw, dtype=torch.float64)
    found = search_features(
        SparseCodes.from_dense(codes), labels, settings=SearchSettings(selection="attribution", pool=9),
        correlations=scores,
    )  # fmt: skip
    by_statistic = search_features(SparseCodes.from_dense(codes), labels, settings=SearchSettings("auroc", "input", 9))
    pool = by_statistic.features
    assert found.features.tolist() == pool[scores[pool].argsort(descending=True)].tolist()
    assert found.rows()[0]["attribution"] == float(scores[pool].max())
    assert found.correlations is None


def test_bad_texts_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="Received: 1 in text 0"):
        text_attributions(model, [[5], *ROWS[1:]], LABELS)
    with pytest.raises(ValueError, match="texts with and without the concept"):
        text_attributions(model, ROWS, torch.ones(5, dtype=torch.long))
    codes = SparseCodes.from_dense(torch.rand(4, 64))
    with pytest.raises(ValueError, match="selection='attribution', correlations=None"):
        search_features(codes, torch.tensor([0, 1, 0, 1]), settings=SearchSettings(selection="attribution"))
