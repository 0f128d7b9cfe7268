"""Histograms of activations, against numpy's and against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_transformers.evaluation.features.histograms import ActivationHistograms
from tests.tiny import tiny_sae


def test_counts_are_those_of_numpy() -> None:
    sae = tiny_sae()
    hidden = torch.randn(400, sae.config.d_in, generator=torch.Generator().manual_seed(0)) * 3
    found = ActivationHistograms(sae.config.d_sae)
    for part in hidden.split(130):
        sparse = sae.encode_sparse(part)
        found.add(sparse.indices, sparse.values)
    dense = sae.encode(hidden).detach()
    assert found.n_tokens == 400
    torch.testing.assert_close(found.active(), (dense != 0).sum(0))
    torch.testing.assert_close(found.maxima, dense.abs().amax(0))
    compared = 0
    for latent in range(sae.config.d_sae):
        histogram, values = found.of(latent), dense[:, latent]
        values = values[values != 0].abs().numpy()
        if len(values):
            expected, _ = np.histogram(values, histogram.edges)
            assert histogram.counts == expected.tolist() and sum(histogram.counts) == len(values)
            assert histogram.counts[0] and histogram.counts[-1]
            assert np.allclose(np.diff(np.log2(histogram.edges)), 1 / 8)
            compared += 1
    assert compared > 20


def test_bins_are_merged_and_ends_are_open() -> None:
    found = ActivationHistograms(3)
    sizes = torch.tensor([[2.0**-30, 1.0, 2.0**30, 3.0]])
    found.add(torch.zeros(1, 4, dtype=torch.long), sizes)
    assert sum(found.of(0).counts) == 4 and len(found.of(0).counts) <= 32
    assert len(found.of(0, most_bins=8).counts) <= 8 and sum(found.of(0, most_bins=8).counts) == 4
    assert found.of(1) == ([], []) and float(found.maxima[0]) == 2.0**30
    found.add(torch.tensor([[2]]), torch.tensor([[1.0]]))
    edges, counts = found.of(2)
    assert counts == [1] and edges == pytest.approx([1.0, 2 ** (1 / 8)])  # [edge, next)


@pytest.mark.parametrize(
    ("indices", "values", "told"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), r"\(2, 3\) and \(2, 2\)"),
        (torch.zeros(1, 1, dtype=torch.long), torch.tensor([[torch.nan]]), "1 that are not"),
    ],
)
def test_bad_input(indices: torch.Tensor, values: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ActivationHistograms(4).add(indices, values)


def test_no_latents() -> None:
    with pytest.raises(ValueError, match="d_sae=0"):
        ActivationHistograms(0)
