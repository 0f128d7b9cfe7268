"""Products at the chosen latents against dense ones, and every gradient by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from sae_transformers.training.sae import sparse_ops
from sae_transformers.training.sae.sparse_ops import Selection, selected_pre_acts, sparse_decode

F64 = torch.float64
N_TOKENS, D_IN, D_SAE, D_OUT = 5, 4, 9, 3
# Unsorted within a token, one token without any, one latent that nothing chooses (8).
CHOSEN = [[3, 0], [5, 1, 7, 2], [], [6], [4, 3, 0]]


# All that could be chosen, in an order of its own; latent 8 could not.
AMONG = [7, 3, 0, 5, 1, 2, 6, 4]


@pytest.fixture(params=["sparse", "dense", "sparse, among some", "dense, among some"])
def branch(request, monkeypatch) -> str:
    monkeypatch.setattr(sparse_ops, "DENSE_ABOVE", {"cpu": 9.0 if request.param.startswith("sparse") else -1.0})
    return request.param


def selection(branch: str = "") -> Selection:
    counts = torch.tensor([len(row) for row in CHOSEN])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    latents = [latent for row in CHOSEN for latent in row]
    if branch.endswith("among some"):
        return Selection(torch.tensor([AMONG.index(n) for n in latents]), offsets, D_SAE, torch.tensor(AMONG))
    return Selection(torch.tensor(latents), offsets, D_SAE)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def spread_by_hand(values: torch.Tensor) -> torch.Tensor:
    out, left = torch.zeros(N_TOKENS, D_SAE, dtype=values.dtype), iter(values)
    for token, latents in enumerate(CHOSEN):
        for latent in latents:
            out[token, latent] = next(left)
    return out


def test_the_pattern():
    s = selection()
    assert s.tokens.tolist() == [0, 0, 1, 1, 1, 1, 3, 4, 4, 4] and s.n_tokens == N_TOKENS
    order, tokens, starts = s.by_latent
    assert s.latents[order].tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert tokens.tolist() == [0, 4, 1, 1, 0, 4, 4, 1, 3, 1]
    assert starts.tolist() == [0, 2, 3, 4, 6, 7, 8, 9, 10]


def test_products_equal_dense_ones(branch):
    s, values = selection(branch), numbers(10)
    z = spread_by_hand(values)
    assert s.dense == s.densely_sampled == branch.startswith("dense")
    assert torch.equal(s.spread(values), z)
    rows, tokens = numbers(D_SAE, D_OUT, seed=1), numbers(N_TOKENS, D_OUT, seed=2)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(s.times(values, rows), z @ rows, **close)
    torch.testing.assert_close(s.transposed_times(values, tokens), z.T @ tokens, **close)
    at = (tokens @ rows.T)[s.tokens, s.latents]
    torch.testing.assert_close(s.sampled(tokens, rows), at, **close)
    torch.testing.assert_close(s.column_sums(values), z.sum(0), **close)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradient_of_selected_pre_acts(branch, with_bias):
    s = selection(branch)

    def pre_acts(hidden, W_enc, b_enc, b_dec):
        b_dec = b_dec if with_bias else None
        x = hidden if b_dec is None else hidden - b_dec
        values = (x @ W_enc + b_enc)[s.tokens, s.latents].detach()
        return selected_pre_acts(values, s, hidden, W_enc, b_enc, b_dec)

    inputs = (numbers(N_TOKENS, D_IN), numbers(D_IN, D_SAE, seed=1), numbers(D_SAE, seed=2), numbers(D_IN, seed=3))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    hidden, W_enc, b_enc, b_dec = inputs
    x = hidden - b_dec if with_bias else hidden
    plain = (x @ W_enc + b_enc)[s.tokens, s.latents]
    torch.testing.assert_close(pre_acts(*inputs), plain, rtol=0, atol=0)
    # Every single output is differentiated, and by finite differences of the function itself.
    if with_bias:
        assert gradcheck(pre_acts, inputs)
    weights = numbers(10, seed=4)
    found = torch.autograd.grad(pre_acts(*inputs) @ weights, inputs, allow_unused=True)
    expected = torch.autograd.grad(plain @ weights, inputs, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_pre_activation_used_twice_gets_both_gradients(branch):
    s, hidden, b_enc = selection(branch), numbers(N_TOKENS, D_IN), numbers(D_SAE, seed=2)
    W_enc, W_dec = numbers(D_IN, D_SAE, seed=1).requires_grad_(), numbers(D_SAE, D_OUT, seed=3)
    plain = (hidden @ W_enc + b_enc)[s.tokens, s.latents]
    ours = selected_pre_acts(plain, s, hidden, W_enc, b_enc)
    found, expected = (
        torch.autograd.grad(decode(torch.relu(a)).square().sum() + a.sin().sum(), W_enc)[0]
        for a, decode in ((ours, lambda z: sparse_decode(z, s, W_dec)), (plain, lambda z: spread_by_hand(z) @ W_dec))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_sparse_decode(branch):
    s = selection(branch)
    inputs = (numbers(10).requires_grad_(), numbers(D_SAE, D_OUT, seed=1).requires_grad_())
    assert gradcheck(lambda latents, rows: sparse_decode(latents, s, rows), inputs)
    torch.testing.assert_close(
        sparse_decode(*inputs[:1], s, inputs[1]), spread_by_hand(inputs[0]) @ inputs[1], rtol=1e-12, atol=1e-12
    )


def test_a_gradient_that_is_not_contiguous(branch):
    s, rows = selection(branch), numbers(D_SAE, D_OUT, seed=1).requires_grad_()
    latents, weights = numbers(10).requires_grad_(), numbers(D_OUT, N_TOKENS, seed=2).T
    found = torch.autograd.grad((sparse_decode(latents, s, rows) * weights).sum(), (latents, rows))
    expected = torch.autograd.grad((spread_by_hand(latents) @ rows * weights).sum(), (latents, rows))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_computed_for_what_needs_none(branch, monkeypatch):
    s, W_enc = selection(branch), numbers(D_IN, D_SAE, seed=1)
    calls = []

    def recorded(name: str, method: Any) -> Any:
        return lambda *args: calls.append(name) or method(*args)

    for name in ("times", "transposed_times", "sampled", "column_sums"):
        monkeypatch.setattr(Selection, name, recorded(name, getattr(Selection, name)))
    b_enc = numbers(D_SAE, seed=2).requires_grad_()
    selected_pre_acts(numbers(10), s, numbers(N_TOKENS, D_IN), W_enc, b_enc).sum().backward()
    assert calls == ["column_sums"]


@pytest.mark.parametrize("chosen", [0, 3])
def test_nothing_chosen_and_no_tokens(branch, chosen):
    """`chosen` tokens, none of which has a latent."""
    s = Selection(torch.empty(0, dtype=torch.long), torch.zeros(chosen + 1, dtype=torch.long), D_SAE)
    W_enc, W_dec = numbers(D_IN, D_SAE).requires_grad_(), numbers(D_SAE, D_OUT).requires_grad_()
    pre_acts = selected_pre_acts(numbers(0), s, numbers(chosen, D_IN), W_enc, numbers(D_SAE), numbers(D_IN))
    out = sparse_decode(pre_acts, s, W_dec)
    assert torch.equal(out, torch.zeros(chosen, D_OUT, dtype=F64))
    out.sum().backward()
    for parameter in (W_enc, W_dec):
        assert parameter.grad is not None and not parameter.grad.any()


def test_autocast_gives_the_dtype_of_the_weights(branch):
    s, W_dec = selection(branch), numbers(D_SAE, D_OUT, dtype=torch.float32).requires_grad_()
    latents = numbers(10, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_decode(latents, s, W_dec)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, spread_by_hand(latents) @ W_dec, rtol=2e-2, atol=2e-2)
    out.square().sum().backward()
    assert latents.grad is not None and latents.grad.dtype == torch.float32
