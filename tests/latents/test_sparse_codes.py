"""Sparse codes of texts equal what dense tensors give."""

from __future__ import annotations

import pytest
import torch

from sae_transformers.latents.sparse_codes import SparseCodes, encode_texts, stack_rows
from tests.tiny import tiny_sae

TEXTS = torch.tensor([0, 0, 2, 1, 1, 1, 0, 3])  # a text's tokens need not be together


def states(n: int = 8) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(0))


def pooled_densely(latents: torch.Tensor, pooling: str) -> torch.Tensor:
    rows = []
    for text in range(4):
        mine = latents[text == TEXTS].double()
        rows.append({"mean": mine.mean(0), "sum": mine.sum(0), "count": (mine != 0).double().sum(0)}.get(pooling))
        if pooling == "max":
            rows[-1] = mine.amax(0)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("pooling", ["mean", "max", "sum", "count"])
def test_equals_dense(activation, pooling):
    sae = tiny_sae(activation=activation, layer=0)
    codes = encode_texts(sae, states(), TEXTS, pooling=pooling, tokens_at_once=3)
    expected = pooled_densely(sae.encode(states()), pooling)
    torch.testing.assert_close(codes.to_dense(), expected, rtol=1e-5, atol=1e-6)
    assert bool((codes.latents.diff() >= 0).all())
    assert codes.live().tolist() == (expected != 0).any(0).nonzero()[:, 0].tolist()
    torch.testing.assert_close(codes.sums(), expected.sum(0), rtol=1e-5, atol=1e-6)
    assert codes.counts().tolist() == (expected != 0).sum(0).tolist()
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0])
    torch.testing.assert_close(codes.sums(weights), weights.double() @ expected, rtol=1e-5, atol=1e-6)


def test_rows_and_columns():
    dense = states().relu()
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense.double())
    latents = torch.tensor([31, 3, 3, 0])
    assert torch.equal(codes.columns(latents), dense.double()[:, latents])
    rows = torch.tensor([5, 0, 7])
    assert torch.equal(codes.take_rows(rows).to_dense(), dense.double()[rows])
    both = stack_rows([codes, codes.take_rows(rows)])
    assert torch.equal(both.to_dense(), torch.cat([dense, dense[rows]]).double())


def test_bad_input():
    sae = tiny_sae(layer=0)
    with pytest.raises(ValueError, match="pooling='middle'"):
        encode_texts(sae, states(), TEXTS, pooling="middle")
    with pytest.raises(ValueError, match=r"Expected hidden states \(n, 32\). Received: \(8, 5\)"):
        encode_texts(sae, states()[:, :5])
    with pytest.raises(ValueError, match="5 texts, 1 of them without a token"):
        encode_texts(sae, states(), TEXTS, 5)
