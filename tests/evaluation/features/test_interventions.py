"""How near texts are to features' words, by hand; and the scores that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers.evaluation.features.interventions import (
    FeatureWords,
    feature_words,
    intervention_scores,
    similarities,
)
from sae_transformers.evaluation.features.table import feature_table
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_model, tiny_sae


def words(*tokens: str, weights: Sequence[float] = (3.0, 1.0)) -> FeatureWords:
    ids = torch.tensor([word_tokenizer().convert_tokens_to_ids(token.strip()) for token in tokens])
    return FeatureWords(0, 0, list(tokens), ids, torch.tensor(weights))


def near(kind: str, texts: list[str], *some: FeatureWords, **more: Any) -> torch.Tensor:
    return similarities(kind, texts, some, tiny_model(saes=[tiny_sae(layer=1)]), word_tokenizer(), **more)


def test_words_of_a_feature_are_those_of_its_table() -> None:
    model = tiny_model(saes=[tiny_sae(layer=1), tiny_sae(2, layer=1)])
    found = feature_words(model, word_tokenizer(), [(1, 9), (0, 3)], 4)
    for one, sae, feature in zip(found, (1, 0), (9, 3), strict=True):
        table = feature_table(model, word_tokenizer(), model.saes[sae], top_k=4)
        assert (one.sae, one.feature, one.tokens) == (sae, feature, table.top_tokens[feature])
        torch.testing.assert_close(one.weights, table.weights.top_weights[feature])


@pytest.mark.parametrize("kind", ["input", "output"])
def test_similarity_by_the_models_own_embeddings(kind: str) -> None:
    model = tiny_model(saes=[tiny_sae(layer=1)])
    base = model.lm
    table = (base.get_input_embeddings() if kind == "input" else base.get_output_embeddings()).weight.detach().double()
    table = table - table.mean(0)
    first = torch.linalg.svd(table).Vh[0]  # of 32 numbers, one principal direction
    table = table - (table @ first)[:, None] * first
    found = near(kind, ["w1 w5 w5", "w7", ""], words("w1", " w2"), words("w7", "w8", weights=(1.0, -2.0)))
    text = (table[5] + 2 * table[9]) / 3  # w1 is token 5
    feature = 3 * table[5] + table[6]
    assert float(found[0, 0]) == pytest.approx(float(torch.cosine_similarity(text, feature, 0)), abs=1e-5)
    assert float(found[1, 1]) == pytest.approx(1.0, abs=1e-6)  # a negative weight does not count
    assert found[2].tolist() == [0.0, 0.0]


def test_similarity_by_shared_words() -> None:
    found = near("words", ["The cat, a Cat!", "dogs", " 12 "], words(" cat", "the"), words("DOG", "dogs"))
    assert found.tolist() == [[3 / 4, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_similarity_by_word_vectors(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("cat 1 0\ndog 0 1\npet 1 1\nother 5 5\n")
    found = near(str(tmp_path / "glove.txt"), ["Cat cat dog", "none here"], words(" cat", " pet"), words("dog", "??"))
    text, feature = torch.tensor([2.0, 1.0]), torch.tensor([3 + 1.0, 1.0])
    assert float(found[0, 0]) == pytest.approx(float(torch.cosine_similarity(text, feature, 0)))
    assert float(found[0, 1]) == pytest.approx(1 / 5**0.5) and found[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="hold a word of the texts or of the features"):
        near(str(tmp_path / "glove.txt"), ["nothing"], words("w1", "w2"))


def test_similarity_by_sentences() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.tensor([[len(text), 1.0] for text in texts])

    found = near("sentences", ["abc", " ", "abc"], words("a", "b"), embed=embed)
    assert seen == ["abc", "a b"] and found[:, 0].tolist() == pytest.approx([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="needs `embed`"):
        near("sentences", ["abc"], words("a", "b"))


def test_scores_by_hand() -> None:
    # steered[i, r, j]: text r of feature i to the words of feature j
    steered = torch.tensor([
        [[0.9, 0.1, 0.0], [0.7, 0.3, 0.0]],
        [[0.5, 0.2, 0.1], [0.1, 0.4, 0.3]],
        [[0.0, 0.0, 0.8], [0.2, 0.9, 0.8]],
    ])  # fmt: skip
    unsteered = torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.2, 0.1]])
    found = intervention_scores(steered, unsteered)
    torch.testing.assert_close(found.steered, torch.tensor([0.8, 0.3, 0.8]).double())
    torch.testing.assert_close(found.unsteered, torch.tensor([0.3, 0.2, 0.1]).double())
    torch.testing.assert_close(found.random, torch.tensor([(0.3 + 0.1) / 2, (0.2 + 0.45) / 2, 0.1]).double())
    torch.testing.assert_close(found.passed, torch.tensor([1.0, 0.5, 1.0]).double())
    torch.testing.assert_close(found.passed_random, torch.tensor([0.25, 0.5, 0.25]).double())
    with pytest.raises(ValueError, match="2 features or more"):
        intervention_scores(steered[:1, :, :1], unsteered[:, :1])
