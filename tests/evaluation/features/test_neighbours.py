"""Nearest decoder rows, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_transformers.evaluation.features import neighbours as module
from sae_transformers.evaluation.features.neighbours import decoder_neighbours


def test_neighbours_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = decoder_neighbours(rows, 3)
    index = neighbors.NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(rows.numpy())
    distances, expected = index.kneighbors(rows.numpy())
    assert np.array_equal(found.latents.numpy(), expected[:, 1:])
    assert np.allclose(found.cosines.numpy(), 1 - distances[:, 1:], atol=1e-5)
    some = decoder_neighbours(rows, 3, [5, 39])
    assert torch.equal(some.latents, found.latents[[5, 39]])


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        decoder_neighbours(torch.eye(4), k)
