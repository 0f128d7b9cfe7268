"""The latents of a training step are those that the SAE gives, for every activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers.training.sae import latent_selection
from sae_transformers.training.sae.encoding import Code, encode, encode_among, encode_seen, top_k_among
from tests.tiny import WIDTH, tiny_sae

F64 = torch.float64
D_SAE, K = 64, 5
ACTIVATIONS = (
    "relu", "topk", "topk-sigmoid", "topk-tanh", "topk-identity", "abs_topk", "groupmax", "batch_topk", "jumprelu",
    "gated", "identity",
)  # fmt: skip


def new_sae(activation: str, **settings: Any) -> Any:
    k = {"k": 8 if activation == "groupmax" else K} if "top" in activation or activation == "groupmax" else {}
    return tiny_sae(dtype=F64, activation=activation, **k, **settings)


def hidden(n: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(seed))


def dense(code: Code) -> torch.Tensor:
    return code.selection.spread(code.latents)


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_are_those_of_the_sae(activation, normalization):
    sae, x = new_sae(activation, normalization=normalization), hidden()
    code = encode(sae, sae.normalize(x).x, sae.config.k or 0, False, 0.01)
    torch.testing.assert_close(dense(code), sae.encode(x), rtol=1e-12, atol=1e-12)
    assert (sae.encode(x) != 0).any()


def test_batch_topk_picks_from_the_batch_in_training():
    sae, x = new_sae("batch_topk"), hidden()
    pre_acts = sae.encode_pre_acts(x)
    code = encode(sae, x, K, True, 0.01)
    wanted = torch.zeros_like(pre_acts).flatten()
    best = pre_acts.flatten().topk(K * len(x))
    wanted[best.indices] = best.values
    torch.testing.assert_close(dense(code), wanted.view_as(pre_acts), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dense(code), sae.encode(x))  # that goes by the threshold


def test_a_threshold_of_zero_or_below_lets_no_negative_latent_through():
    sae, x = new_sae("batch_topk"), hidden()
    for threshold in (0.0, -0.5):
        sae.threshold.fill_(threshold)
        code = encode(sae, x, K, False, 0.01)
        assert (code.latents > 0).all()
        torch.testing.assert_close(dense(code), sae.encode_pre_acts(x).relu(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 12, 200])
def test_k_of_the_step_is_used_and_not_the_config(k):
    sae, x = new_sae("topk"), hidden()
    code = encode(sae, x, k, True, 0.01)
    best = sae.encode_pre_acts(x).topk(min(k, D_SAE))
    wanted = torch.zeros(len(x), D_SAE, dtype=F64).scatter(1, best.indices, best.values.relu())
    torch.testing.assert_close(dense(code), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [1e-3, 0.5])
def test_jumprelu_counts_active_latents_for_its_sparsity(bandwidth):
    sae, x = new_sae("jumprelu"), hidden()
    code = encode(sae, x, 0, True, bandwidth)
    assert code.sparsity is not None
    assert torch.equal(code.sparsity(sae, x), (sae.encode_pre_acts(x) > sae.threshold).to(F64).sum(-1))


def test_the_thresholds_gradient_is_the_published_one():
    """Equations 11 and 12 of the JumpReLU paper, one pre-activation at a time."""
    width = 0.4
    sae = tiny_sae(dtype=F64, d_in=1, d_sae=3, activation="jumprelu", apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.b_enc.zero_()
        sae.threshold.copy_(torch.tensor([0.7, 1.0, 1.5]))  # just below, just above and far above what comes
    code = encode(sae, torch.tensor([[0.85]], dtype=F64), 0, True, width)
    assert code.sparsity is not None
    latents = torch.autograd.grad(dense(code).sum(), sae.threshold, retain_graph=True)[0]
    torch.testing.assert_close(latents, torch.tensor([-0.7 / width, -1.0 / width, 0.0], dtype=F64))
    count = torch.autograd.grad(code.sparsity(sae, torch.ones(1, 1)).sum(), sae.threshold)[0]
    torch.testing.assert_close(count, torch.tensor([-1 / width, -1 / width, 0.0], dtype=F64))


@pytest.mark.parametrize("members", [[], [7], [3, 50, 9], list(range(0, 64, 2))])
@pytest.mark.parametrize("rectified", [True, False])
def test_the_best_among_some(members, rectified):
    """Fewer than k members: all of them, and none of the others."""
    sae, x = new_sae("topk"), hidden()
    code = encode_among(sae, x, 4, torch.tensor(members, dtype=torch.long), rectified=rectified)
    pre_acts = sae.encode_pre_acts(x)
    assert code.selection.offsets.diff().tolist() == [min(4, len(members))] * len(x)
    wanted = torch.zeros_like(pre_acts)
    if members:
        best = pre_acts[:, members].topk(min(4, len(members)))
        values = best.values.relu() if rectified else best.values
        wanted.scatter_(1, torch.tensor(members)[best.indices], values)
    torch.testing.assert_close(dense(code), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("activation", "after"), [("topk-sigmoid", torch.sigmoid), ("topk-tanh", torch.tanh)])
def test_latents_among_some_have_the_saes_own_activation(activation, after):
    sae, x = new_sae(activation), hidden()
    code = encode_among(sae, x, 2, torch.tensor([4, 5]))
    torch.testing.assert_close(dense(code)[:, 4:6], after(sae.encode_pre_acts(x)[:, 4:6]), rtol=1e-12, atol=1e-12)


def test_latents_among_some_are_the_largest_by_the_activations_own_measure():
    """AuxK of an `abs_topk` SAE goes by magnitude, as the activation does."""
    among = torch.arange(0, D_SAE, 3)
    for activation in ("abs_topk", "topk"):
        sae, x = new_sae(activation), hidden()
        pre_acts = sae.encode_pre_acts(x)[:, among]
        best = (pre_acts.abs() if activation == "abs_topk" else pre_acts).topk(4).indices
        wanted = torch.zeros(len(x), D_SAE, dtype=F64).scatter(1, among[best], pre_acts.gather(1, best))
        found = encode_among(sae, sae.normalize(x).x, 4, among, rectified=False)
        torch.testing.assert_close(dense(found), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_tokens", [1, 7, 1000])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_among_some_made_in_passing(monkeypatch, activation, training, block_tokens):
    """From the pre-activations of the choice among all, which stays what it is; values and gradients are those of a
    product of their own."""
    monkeypatch.setitem(latent_selection.BLOCK_ELEMENTS, "cpu", block_tokens * D_SAE)
    sae, x, members = new_sae(activation), hidden(), torch.tensor([50, 3, 9, 33, 8, 40])
    k = sae.config.k or 0
    among = top_k_among(sae, 4, members)
    whole = encode(sae, x, k, training, 0.01, among)
    assert torch.equal(dense(whole), dense(encode(sae, x, k, training, 0.01)))
    found, wanted = encode_seen(sae, x, among), encode_among(sae, x, 4, members)
    assert found.selection.among is members and found.selection.n_columns == len(members)
    torch.testing.assert_close(dense(found), dense(wanted), rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(code.latents.square().sum(), (sae.W_enc, sae.b_dec)) for code in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(gradient.abs().max() > 1e-6 for gradient in ours)


def test_latents_made_in_passing_are_seen_once_where_a_batch_is_read_twice():
    """A BatchTopK whose sampled bound lets too few through."""
    sae, x = new_sae("batch_topk", apply_b_dec_to_input=False), hidden(640)
    x[::10] *= 10
    among = top_k_among(sae, 2, torch.tensor([4, 5, 7]))
    encode(sae, x, K, True, 0.01, among)
    wanted = encode_among(sae, x, 2, torch.tensor([4, 5, 7]))
    torch.testing.assert_close(dense(encode_seen(sae, x, among)), dense(wanted), rtol=1e-12, atol=1e-12)
