"""The coherence formula against its sum over pairs, and where embeddings come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sae_transformers.evaluation.features.coherence import (
    coherence,
    letters,
    read_vectors,
    token_coherence,
    word_coherence,
)
from tests.tiny import VOCAB, tiny_base

F64 = torch.float64


def by_pairs(embeddings: torch.Tensor, weights: torch.Tensor, valid: torch.Tensor) -> float:
    chosen = valid.nonzero()[:, 0].tolist()
    top = total = 0.0
    for place, i in enumerate(chosen):
        for j in chosen[place + 1 :]:
            w = float(weights[i] * weights[j])
            top += w * float(F.cosine_similarity(embeddings[i], embeddings[j], dim=0))
            total += w
    return top / (total + 1e-8) if len(chosen) > 1 else 0.0


def test_equals_the_sum_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(6, 5, 4, generator=generator, dtype=F64)
    weights = torch.rand(6, 5, generator=generator, dtype=F64)
    valid = torch.rand(6, 5, generator=generator) < 0.6
    valid[0], valid[1] = False, torch.tensor([True, False, False, False, False])
    found = coherence(embeddings, weights, valid)
    assert found[:2].tolist() == [0.0, 0.0]
    expected = [by_pairs(*row) for row in zip(embeddings, weights, valid, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(coherence(embeddings * 7, weights, valid), found)  # lengths do not count


def test_an_embedding_of_zeros_does_not_count() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])
    assert float(coherence(embeddings, torch.ones(1, 3))) == pytest.approx(2**-0.5)
    assert float(coherence(embeddings[:, :2], torch.ones(1, 2))) == 0.0


def test_embeddings_of_the_model() -> None:
    base = tiny_base(tie_word_embeddings=False)
    ids = torch.randint(0, VOCAB, (5, 4), generator=torch.Generator().manual_seed(1))
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
    for kind, module in (("input", base.get_input_embeddings()), ("output", base.get_output_embeddings())):
        table = module.weight.detach() - module.weight.detach().mean(0)
        found = token_coherence(base, ids, weights, embedding=kind, rows_at_once=2)
        torch.testing.assert_close(found, coherence(table[ids], weights), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="embedding='glove'"):
        token_coherence(base, ids, weights, embedding="glove")


def test_words() -> None:
    vectors = {"cat": torch.tensor([1.0, 0.0]), "dog": torch.tensor([0.6, 0.8])}
    tokens = [[" Cat", "dog", "of"], ["cat", "CAT!", "Ġ"], ["cat", "7", "é"], ["a", "b", "c"]]
    weights = torch.tensor([[3.0, 2.0, 9.0], [2.0, 1.0, 5.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    found = word_coherence(tokens, weights, vectors)
    torch.testing.assert_close(found, torch.tensor([0.6, 1.0, 0.0, 0.0], dtype=F64), atol=1e-7, rtol=0)
    assert letters(" Café-2") == "caf"
    with pytest.raises(ValueError, match="Received: none"):
        word_coherence(tokens, weights, {})


def test_vectors_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "glove.txt"
    file.write_text("cat 1 0.5\ndog -1 2e-1\n\n", encoding="utf-8")
    assert {word: vector.tolist() for word, vector in read_vectors(file).items()} == {
        "cat": [1.0, 0.5], "dog": [-1.0, pytest.approx(0.2)]
    }  # fmt: skip
    assert list(read_vectors(file, ["dog", "owl"])) == ["dog"]
    file.write_text("2 2\ncat 1 0.5\n", encoding="utf-8")
    assert list(read_vectors(file)) == ["cat"]
    for text, told in (("cat 1 2\ndog 1\n", "line 2"), ("cat 1 x\n", "numbers")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=told):
            read_vectors(file)


def test_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(2, 2\)"):
        coherence(torch.ones(2, 3, 4), torch.ones(2, 2))
