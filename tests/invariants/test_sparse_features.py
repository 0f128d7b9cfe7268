"""Sparse and dense forms of a code are the same code."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import SparseFeatures
from sae_transformers.modeling.configuration_sparse_autoencoder import ACTIVATIONS
from tests.tiny import tiny_sae


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sparse_form(activation):
    sae = tiny_sae(activation=activation, layer=0)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    sparse, dense = sae.encode_sparse(x), sae.encode(x)
    assert torch.equal(sparse.to_dense(), dense)
    assert torch.equal(sparse.column(0), dense[..., 0])
    picked = torch.tensor([0, 7, 63])
    torch.testing.assert_close(sae.encode_selected(x, picked), dense[..., picked], rtol=1e-5, atol=1e-6)


def test_nothing_active():
    sparse = SparseFeatures.from_dense(torch.zeros(2, 3, 7))
    assert sparse.values.shape == (2, 3, 1)
    assert torch.equal(sparse.to_dense(), torch.zeros(2, 3, 7))


@pytest.mark.parametrize("active", [1, 3, 200])
def test_decoding_the_active_rows_alone(active):
    """Without gradients, few active latents are gathered; the result is that of the dense product."""
    sae = tiny_sae(activation="relu", layer=0, d_sae=512, dtype=torch.float64, apply_b_dec_to_input=False)
    x = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.sub_(sae.encode_pre_acts(x).topk(active, dim=-1).values[:, -1].median())
        sparse = sae(x).reconstruction
    dense = sae(x).reconstruction
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
