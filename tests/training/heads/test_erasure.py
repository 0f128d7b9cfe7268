"""Directions erased from hidden states: what is left of them, what else changes, and the layer that does it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_transformers.training.heads.erasure import difference_sae, leace, project_out, swap_directions
from sae_transformers.training.heads.losses import unintended_penalty
from sae_transformers.training.heads.settings import HeadSettings
from sae_transformers.training.heads.train import train_heads

D, K = 12, 2


def draw(seed: int = 0, n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """States with an uneven covariance, and pairs that differ in two directions of unlike size, some either way."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    states = torch.randn(n, D, generator=generator, dtype=torch.float64) @ mix + 3
    planted = torch.linalg.qr(torch.randn(D, K, generator=generator, dtype=torch.float64))[0]
    amount = torch.randn(n, K, generator=generator, dtype=torch.float64) * torch.tensor(
        [5.0, 2.0], dtype=torch.float64
    )
    return states, states + amount @ planted.T, planted


@pytest.mark.parametrize("erase", [project_out, leace])
def test_erased_states_of_a_pair_are_the_same(erase) -> None:
    states, swapped, planted = draw()
    directions = swap_directions(states, swapped, K)
    torch.testing.assert_close(directions @ directions.T, planted @ planted.T)  # the same plane
    erasure = erase(states, directions)
    torch.testing.assert_close(erasure(states), erasure(swapped))
    torch.testing.assert_close(erasure(erasure(states)), erasure(states))
    torch.testing.assert_close(erasure(states).mean(0), states.mean(0))
    assert not torch.allclose(erasure(states), states)


def test_directions_come_by_size_and_no_more_than_there_are() -> None:
    states, swapped, planted = draw()
    found = swap_directions(states, swapped, 7)
    assert found.shape == (D, K)
    one = swap_directions(states, swapped, 1)
    assert float((one.T @ planted[:, :1]).abs()) > 0.99
    one_way = swap_directions(states, states + 3 * planted[:, 0], 3)  # all pairs alike: the mean difference
    assert one_way.shape == (D, 1)
    torch.testing.assert_close(one_way[:, 0].abs(), planted[:, 0].abs())


def test_leace_leaves_nothing_to_a_linear_classifier_and_changes_least() -> None:
    """Guardedness: no covariance with the concept is left; and no other projection with that kernel changes less."""
    states, _, _ = draw(n=4000)
    label = (states[:, 0] + 0.3 * states[:, 4] > 3).double()
    direction = ((states - states.mean(0)).T @ (label - label.mean()) / len(states))[:, None]
    erasure = leace(states, direction)
    left = erasure(states)
    assert float(((left - left.mean(0)).T @ (label - label.mean()) / len(states)).norm()) < 2e-3 * float(
        direction.norm()
    )
    other = project_out(states, direction / direction.norm())(states)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(states.T)))
    for metric in (torch.eye(D, dtype=torch.float64), whiten):
        mine, theirs = (((found - states) @ metric.T).square().mean() for found in (left, other))
        assert mine <= theirs


def test_leace_by_hand_in_two_dimensions() -> None:
    """Covariance diag(4, 1), direction (1, 1): W u = (1/2, 1), so Q = (1, 2) / sqrt 5 and what is taken out of (2, 0),
    whitened (1, 0), is Q (1 / sqrt 5) = (1/5, 2/5), in states (2/5, 2/5)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    rows = (rows - rows.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(rows.T.cov(correction=0))).T
    states = rows * torch.tensor([2.0, 1.0], dtype=torch.float64)
    erasure = leace(states, torch.ones(2, 1))
    left = erasure(torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(left, torch.tensor([[1.6, -0.4]], dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_fewer_states_than_coordinates_will_do() -> None:
    states, swapped, _ = draw(n=6)
    erasure = leace(states, swap_directions(states, swapped, 1))
    assert torch.isfinite(erasure(states)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_takes_the_erasure_in(dtype: torch.dtype) -> None:
    states, swapped, _ = draw()
    erasure = leace(states, swap_directions(states, swapped, K))
    weight, bias = torch.randn(3, D, dtype=dtype), torch.randn(3, dtype=dtype)
    folded = F.linear(states.to(dtype), *erasure.folded(weight, bias))
    torch.testing.assert_close(folded, F.linear(erasure(states.to(dtype)), weight, bias), rtol=1e-4, atol=1e-4)
    assert folded.dtype == dtype


def test_what_cannot_be_erased_is_refused() -> None:
    states, swapped, _ = draw()
    with pytest.raises(ValueError, match="Some pair of states must differ"):
        swap_directions(states, states, 1)
    with pytest.raises(ValueError, match=r"Received: \(200, 12\) and \(3, 12\), count=1"):
        swap_directions(states, swapped[:3], 1)
    with pytest.raises(ValueError, match=r"directions \(d, k\). Received: \(200, 12\) and \(3, 2\)"):
        leace(states, torch.ones(3, 2))


def test_a_penalty_on_differences_is_how_far_the_logits_of_pairs_are_apart() -> None:
    states, swapped, _ = draw(n=40)
    weight, bias = torch.randn(2, D), torch.randn(2)
    sae = difference_sae((states - swapped).float())
    apart = F.linear(states.float(), weight, bias) - F.linear(swapped.float(), weight, bias)
    found = unintended_penalty(weight, sae.W_dec.detach().T)
    torch.testing.assert_close(found, apart.abs().mean(0), rtol=1e-4, atol=1e-4)
    labels = (states[:, 0] > 3).long()
    one = HeadSettings(
        method="selfreg", alignment="decoder", removal="none", penalty=3.0, epochs=60, patience=60, learning_rate=0.03
    )
    heads = train_heads(states.float(), labels, [(one, 0), (replace(one, penalty=0.0), 0)], sae=sae,
                        unintended=torch.arange(40))  # fmt: skip
    near, far = (float((head.logits(states) - head.logits(swapped)).abs().mean()) for head in heads)
    assert near < 0.5 * far
