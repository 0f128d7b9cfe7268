"""Where an SAE starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.training.sae.initialization import (
    geometric_median,
    initialize,
    point_concepts_at_diffmean,
    point_latent_at,
    scale_decoder_to_unit_norm,
    usual_norm,
    usual_norm_limit,
)

F64 = torch.float64


def new_sae(**settings: Any) -> SparseAutoencoder:
    torch.manual_seed(0)
    return SparseAutoencoder(SparseAutoencoderConfig(**{"d_in": 16, "d_sae": 64, **settings}), dtype=F64)


def points(n: int = 400, d: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 + torch.arange(d) / 4


def test_kaiming_has_selfregs_deviation():
    """`kaiming_normal_(zeros(d, n), mode="fan_out")` is sqrt(2 / d): 0.0221 at 4096; 0.363 was drawn at 16 x 64."""
    deviations = []
    for seed in range(50):
        torch.manual_seed(seed)
        sae = new_sae(tied=True, activation="topk", k=4)
        torch.manual_seed(seed)
        initialize(sae, points(), weights="kaiming", bias="zeros")
        assert sae.W_enc.shape == (16, 64) and not sae.b_enc.any() and not sae.b_dec.any()
        deviations.append(float(sae.W_enc.detach().std()))
    assert sum(deviations) / 50 == pytest.approx(math.sqrt(2 / 16), rel=5e-3)
    assert min(deviations) < 0.363 < max(deviations)
    torch.manual_seed(0)
    reference = torch.nn.init.kaiming_normal_(torch.zeros(16, 2000), mode="fan_out").std()
    assert float(reference) == pytest.approx(math.sqrt(2 / 16), rel=2e-2)


@pytest.mark.parametrize("weights", ["tied_unit_norm", "kaiming"])
def test_the_encoder_starts_as_the_decoders_transpose(weights):
    sae = new_sae()
    initialize(sae, points(), weights=weights, bias="zeros")
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    if weights == "tied_unit_norm":
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64, dtype=F64))


def test_keep_changes_nothing():
    sae = new_sae(normalization="scalar", input_scale=0.3)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    initialize(sae, points(), weights="keep", bias="keep")
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert sae.config.input_scale == 0.3


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm", "scalar"])
def test_the_bias_starts_at_the_mean_of_what_the_decoder_gives(normalization):
    """So that an SAE without active latents reconstructs the mean of the normalised data."""
    sae, x = new_sae(normalization=normalization), points()
    initialize(sae, x, weights="tied_unit_norm", bias="mean")
    torch.testing.assert_close(sae.b_dec, sae.normalize(x).x.mean(0), rtol=1e-12, atol=1e-12)
    if normalization == "none":
        torch.testing.assert_close(sae.b_dec, x.mean(0), rtol=1e-12, atol=1e-12)


def test_the_scale_makes_the_mean_norm_the_root_of_the_width():
    sae, x = new_sae(normalization="scalar"), points()
    initialize(sae, x, weights="tied_unit_norm", bias="mean")
    assert float(sae.normalize(x).x.norm(dim=-1).mean()) == pytest.approx(4.0, rel=1e-12)
    known = new_sae(normalization="scalar", input_scale=0.5)
    initialize(known, x, weights="tied_unit_norm", bias="mean")
    assert known.config.input_scale == 0.5


def test_a_transcoders_bias_starts_at_the_mean_of_its_target():
    sae, target = new_sae(d_out=5, apply_b_dec_to_input=False), points(d=5)
    initialize(sae, target, weights="kaiming", bias="mean")
    torch.testing.assert_close(sae.b_dec, target.mean(0), rtol=1e-12, atol=1e-12)


def test_the_geometric_median_has_the_least_sum_of_distances():
    x = points()
    x[:40] += 1000.0  # which move the mean, not the median
    median = geometric_median(x, iterations=1000, tolerance=1e-12)
    directions = (x - median) / (x - median).norm(dim=-1, keepdim=True)
    assert directions.sum(0).norm() < 1e-6 * len(x)  # the gradient of that sum
    assert (median - points()[40:].mean(0)).norm() < 3 < (x.mean(0) - points()[40:].mean(0)).norm()
    sae = new_sae()
    initialize(sae, x, weights="keep", bias="geometric_median")
    torch.testing.assert_close(sae.b_dec, median, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_geometric_median_of_equal_points_is_that_point(dtype):
    point = torch.tensor([[1.0, -2.0, 3.0]], dtype=dtype)
    for n in (1, 2, 50):
        torch.testing.assert_close(geometric_median(point.expand(n, 3)), point[0])
    # More than half of them: it is the median, and the iteration stands on it.
    some = torch.cat([point.expand(7, 3), torch.randn(5, 3, dtype=dtype)])
    torch.testing.assert_close(geometric_median(some, iterations=2000), point[0], rtol=1e-3, atol=1e-3)


def test_rows_of_zeros_stay_where_the_others_get_norm_one():
    sae = new_sae()
    with torch.no_grad():
        sae.W_dec.mul_(7.0)
        sae.W_dec[3] = 0.0
    scale_decoder_to_unit_norm(sae)
    norms = torch.ones(64, dtype=F64)
    norms[3] = 0.0
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), norms)


def test_concepts_start_at_their_difference_of_means():
    sae, x = new_sae(concepts={"a": 5, "b": 9}), points()
    labels = (torch.arange(400) % 2).to(F64)[:, None].repeat(1, 2)
    labels[:100, 1] = -100
    others = sae.W_dec[10:].clone()
    point_concepts_at_diffmean(sae, x, labels)
    for latent, rows in ((5, slice(0, None)), (9, slice(100, None))):
        y = labels[rows, 0]
        wanted = x[rows][y == 1].mean(0) - x[rows][y == 0].mean(0)
        for found in (sae.W_dec[latent], sae.W_enc[:, latent]):
            torch.testing.assert_close(found, wanted / wanted.norm(), rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.W_dec[10:], others)
    with pytest.raises(ValueError, match=r"norm 0\.0"):
        point_latent_at(sae, 3, torch.zeros(16))


def test_the_limit_of_usual_norms_ignores_nan_and_infinity():
    hidden = torch.tensor([[3.0, 4.0], [0.0, 5.0], [torch.nan, 1.0], [torch.inf, 0.0], [5.0, 0.0], [3e3, 4e3]])
    assert usual_norm_limit(hidden, 10.0) == 50.0
    assert usual_norm(hidden).tolist() == [True, True, False, False, True, False]
