"""Losses of tensors against their formulas."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from sae_transformers.modeling.sae_losses import concept_losses, normalized_mse

F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_normalised_mse_of_nothing_is_one_and_of_the_target_zero():
    x = numbers(7, 5)
    assert torch.equal(normalized_mse(x, torch.zeros_like(x)), torch.ones(7, dtype=F64))
    assert not normalized_mse(x, x).any()


def test_normalised_mse_is_a_ratio_for_each_token():
    """SelfReg's fact 2: tokens are averaged after the ratio, so that one of large norm counts like any other."""
    x, output = numbers(7, 5), numbers(7, 5, seed=1)
    x[3] *= 100
    wanted = [sum((o - t) ** 2 for o, t in zip(*rows, strict=True)) / sum(t**2 for t in rows[1]) for rows in
              zip(output.tolist(), x.tolist(), strict=True)]  # fmt: skip
    torch.testing.assert_close(normalized_mse(x, output), torch.tensor(wanted, dtype=F64), rtol=1e-12, atol=0)
    ratio_of_means = (output - x).square().mean() / x.square().mean()
    assert abs(normalized_mse(x, output).mean() - ratio_of_means) > 0.1


def test_normalised_mse_does_not_depend_on_the_unit():
    x, output = numbers(7, 5), numbers(7, 5, seed=1)
    torch.testing.assert_close(normalized_mse(1e6 * x, 1e6 * output), normalized_mse(x, output), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_normalised_mse_of_zeros_that_are_met_is_zero(dtype):
    zeros = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    loss = normalized_mse(torch.zeros(2, 5, dtype=dtype), zeros)
    loss.sum().backward()
    assert not loss.any() and zeros.grad is not None and not zeros.grad.any()


def test_cross_entropy_of_concepts():
    pre_acts = numbers(6, 2).requires_grad_()
    labels = torch.tensor([[0, 1], [1, 0], [0.25, 1], [-100, 0], [1, -100], [-100, -100]], dtype=F64)
    loss = concept_losses(pre_acts, labels)
    for row, column in product(range(6), range(2)):
        label, p = float(labels[row, column]), 1 / (1 + math.exp(-float(pre_acts.detach()[row, column])))
        wanted = 0.0 if label < 0 else -(label * math.log(p) + (1 - label) * math.log(1 - p))
        assert float(loss.detach()[row, column]) == pytest.approx(wanted, rel=1e-12)
    loss.sum().backward()
    known = labels >= 0
    assert pre_acts.grad is not None and not pre_acts.grad[~known].any()
    gradient = torch.sigmoid(pre_acts.detach()) - labels
    torch.testing.assert_close(pre_acts.grad[known], gradient[known], rtol=1e-12, atol=1e-12)


def test_cross_entropy_far_from_zero_is_finite():
    pre_acts = torch.tensor([[1e4, -1e4, 1e4, torch.inf]], dtype=torch.float32, requires_grad=True)
    loss = concept_losses(pre_acts, torch.tensor([[0.0, 1.0, 1.0, -100.0]]))
    loss.sum().backward()
    assert loss.tolist() == [[1e4, 1e4, 0.0, 0.0]]
    assert pre_acts.grad is not None and pre_acts.grad.tolist() == [[1.0, -1.0, 0.0, 0.0]]
