"""Fewer passes over the weights, to the bit what more of them give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sae_transformers.training.sae.optimizer import clip, step_on_rows, stored_by_latent
from tests.tiny import tiny_sae


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[nn.Parameter]:
    """A matrix stored by column, one stored by row, and a vector."""
    return [nn.Parameter(numbers(33, 21).T), nn.Parameter(numbers(33, 21)), nn.Parameter(numbers(21))]


def gradient(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Stored as the parameter is."""
    made = numbers(*like.shape, seed=seed)
    return made if like.is_contiguous() else made.T.contiguous().T


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_step_on_rows_is_the_same_step(kind, options):
    plain, turned = parameters(), parameters()
    optimizers = [kind(given, lr=0.1, fused=True, **options) for given in (plain, turned)]
    step_on_rows(optimizers[1])
    for seed in range(4):
        for given, optimizer in zip((plain, turned), optimizers, strict=True):
            for parameter in given:
                parameter.grad = gradient(parameter, seed)
            optimizer.step()
        for ours, theirs in zip(turned, plain, strict=True):
            assert ours.shape == theirs.shape and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
            assert ours.grad is not None and torch.equal(ours.grad, gradient(ours, seed))
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_stored_state_goes_on_as_it_would_have():
    """With moments as they were and as `torch.load` may give them, by row."""
    found: list[list[nn.Parameter]] = []
    for stop in (False, True):
        given = parameters()
        optimizer = torch.optim.AdamW(given, lr=0.1, fused=True)
        step_on_rows(optimizer)
        for seed in range(4):
            for parameter in given:
                parameter.grad = gradient(parameter, seed)
            optimizer.step()
            if stop and seed == 1:
                state: Any = optimizer.state_dict()
                for moments in state["state"].values():
                    moments.update({name: value.clone().contiguous() for name, value in moments.items()})
                optimizer = torch.optim.AdamW(given, lr=0.1, fused=True)
                step_on_rows(optimizer)
                optimizer.load_state_dict(state)
        found.append(given)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("largest_norm", [0.5, 1e3, float("inf")])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_clipping_is_that_of_torch(largest_norm, bad):
    ours, theirs = parameters(), parameters()
    for given in (ours, theirs):
        for parameter in given[:2]:
            parameter.grad = gradient(parameter, 5)
        if bad is not None and given[0].grad is not None:
            given[0].grad[0, 0] = bad
    norms = clip(ours, largest_norm), nn.utils.clip_grad_norm_(theirs, largest_norm)
    assert torch.equal(torch.stack(norms)[:1].nan_to_num(7.0), torch.stack(norms)[1:].nan_to_num(7.0))
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.equal(mine.grad.nan_to_num(7.0), other.grad.nan_to_num(7.0))
    assert ours[2].grad is None


def test_encoders_are_stored_by_latent_for_a_while():
    sae = tiny_sae()
    before = sae.W_enc.detach().clone()
    with stored_by_latent([sae]):
        assert sae.W_enc.T.is_contiguous() and torch.equal(sae.W_enc, before)
    assert sae.W_enc.is_contiguous() and torch.equal(sae.W_enc, before)
