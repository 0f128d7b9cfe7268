"""Which latents are chosen, against one dense product and one `torch.topk`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers.training.sae import latent_selection as choosing
from sae_transformers.training.sae.latent_selection import above, batch_top_k, choose, largest, top_k_of

F64 = torch.float64
D_IN, D_SAE = 6, 40


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layer(n_tokens: int, seed: int = 0, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        numbers(n_tokens, D_IN, seed=seed),
        numbers(D_IN, D_SAE, seed=seed + 1),
        numbers(D_SAE, seed=seed + 2) + shift,
    )


def as_mask(found: Any, expected_values: torch.Tensor) -> torch.Tensor:
    """Where a selection is, (n_tokens, d_sae) bool; checks its form and that its values are those of that place."""
    selection, values = found
    counts = selection.offsets.diff()
    assert selection.offsets[0] == 0 and selection.offsets[-1] == len(selection.latents) == len(values)
    assert (counts >= 0).all()
    mask = torch.zeros_like(expected_values, dtype=torch.bool)
    mask[selection.tokens, selection.latents] = True
    assert mask.sum() == len(values), "a latent is chosen twice for a token"
    torch.testing.assert_close(values, expected_values[selection.tokens, selection.latents], rtol=1e-12, atol=1e-12)
    return mask


def exact_batch_top_k(pre_acts: torch.Tensor, k: int) -> torch.Tensor:
    mask = torch.zeros(pre_acts.numel(), dtype=torch.bool)
    mask[pre_acts.flatten().topk(min(k * len(pre_acts), pre_acts.numel())).indices] = True
    return mask.view_as(pre_acts) & (pre_acts > 0)


@pytest.mark.parametrize("k", [1, 7, D_SAE, D_SAE + 5])
def test_top_k_of_each_token(k):
    x, W_enc, bias = layer(23)
    pre_acts = x @ W_enc + bias
    mask = as_mask(choose(x, W_enc, bias, top_k_of(k)), pre_acts)
    expected = torch.zeros_like(mask).scatter(1, pre_acts.topk(min(k, D_SAE)).indices, True)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("width", "k"), [(2048, 1), (2048, 64), (2051, 128), (4607, 288), (9216, 32), (9216, 9000)])
def test_the_largest_of_wide_rows_are_those_of_topk(width, k, dtype):
    rows = numbers(17, width, dtype=torch.float32).to(dtype)
    rows[1] = 0.5  # all equal
    rows[2, ::3] = rows[2].max()  # more of the largest than fit
    rows[3, 5] = -torch.inf
    rows[4, width - 1] = torch.nan
    values, indices = largest(rows, k)
    wanted = rows.topk(k)
    assert torch.equal(values.sort(-1, descending=True).values.nan_to_num(99.0), wanted.values.nan_to_num(99.0))
    assert torch.equal(rows.gather(1, indices).nan_to_num(99.0), values.nan_to_num(99.0))
    assert all(len(row.unique()) == k for row in indices)
    if dtype == torch.float64:  # no equal numbers
        different = [0, *range(5, 17)]
        assert torch.equal(indices.sort().values[different], wanted.indices.sort().values[different])


def test_above_a_threshold_is_strict():
    x, W_enc, bias = layer(23)
    pre_acts = x @ W_enc + bias
    each = numbers(D_SAE, seed=9)
    for threshold in (0.0, -torch.inf, torch.tensor(0.5, dtype=F64), each):
        assert torch.equal(as_mask(choose(x, W_enc, bias, above(threshold)), pre_acts), pre_acts > threshold)
    one = torch.ones(1, 1, dtype=F64)
    assert len(choose(one, one, one[0] * 0, above(1.0))[1]) == 0


@pytest.mark.parametrize("elements", [1, D_SAE, 3 * D_SAE + 1, 2**22])
def test_blocks_do_not_change_the_choice(monkeypatch, elements):
    x, W_enc, bias = layer(23)
    results = []
    for size in (2**22, elements):
        monkeypatch.setitem(choosing.BLOCK_ELEMENTS, "cpu", size)
        for chooser in (top_k_of(5), above(0.3)):
            results.append(as_mask(choose(x, W_enc, bias, chooser), x @ W_enc + bias))
        results.append(as_mask(batch_top_k(x, W_enc, bias, 5), x @ W_enc + bias))
    for whole, blocks in zip(results[:3], results[3:], strict=True):
        assert torch.equal(whole, blocks)


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("k", [1, 4])
def test_batch_top_k_is_one_top_k_of_the_batch(n_tokens, k):
    x, W_enc, bias = layer(n_tokens, seed=n_tokens)
    pre_acts = x @ W_enc + bias
    mask = as_mask(batch_top_k(x, W_enc, bias, k), pre_acts)
    assert torch.equal(mask, exact_batch_top_k(pre_acts, k)) and mask.sum() == k * n_tokens


@pytest.mark.parametrize("shift", [-2.0, -4.0, -100.0])
def test_batch_top_k_with_few_positive_pre_activations(shift):
    x, W_enc, bias = layer(300, shift=shift)
    pre_acts = x @ W_enc + bias
    mask = as_mask(batch_top_k(x, W_enc, bias, 12), pre_acts)
    assert torch.equal(mask, exact_batch_top_k(pre_acts, 12)) and mask.sum() < 12 * 300


def test_batch_top_k_where_the_sampled_bound_lets_too_few_through(monkeypatch):
    """Every sampled token is ten times as active as the others."""
    x, W_enc, bias = layer(640)
    x[::10] *= 10
    pre_acts, seen = x @ W_enc + bias, []
    choose_once = choosing.choose
    monkeypatch.setattr(choosing, "choose", lambda *a: seen.append(choose_once(*a)) or seen[-1])
    mask = as_mask(batch_top_k(x, W_enc, bias, 4), pre_acts)
    assert [len(values) < 4 * 640 for _, values in seen] == [True, False]
    assert torch.equal(mask, exact_batch_top_k(pre_acts, 4))


def test_batch_top_k_reads_the_batch_once_where_tokens_are_alike(monkeypatch):
    x, W_enc, bias = layer(2000)
    calls, choose_once = [], choosing.choose
    monkeypatch.setattr(choosing, "choose", lambda *a: calls.append(1) or choose_once(*a))
    batch_top_k(x, W_enc, bias, 4)
    assert len(calls) == 1


def test_no_tokens_and_no_latents():
    x, W_enc, bias = layer(0)
    for selection, values in (choose(x, W_enc, bias, top_k_of(3)), batch_top_k(x, W_enc, bias, 3)):
        assert selection.n_tokens == 0 and len(values) == 0
    x, W_enc, bias = layer(4)
    selection, values = choose(x, W_enc[:, :0], bias[:0], top_k_of(3))
    assert selection.offsets.tolist() == [0] * 5 and len(values) == 0


def test_autocast_computes_in_its_dtype_and_gives_that_of_the_weights():
    x, W_enc, bias = (t.float() for t in layer(50))
    with torch.autocast("cpu", torch.bfloat16):
        selection, values = choose(x, W_enc, bias, top_k_of(3))
        batch_selection, batch_values = batch_top_k(x, W_enc, bias, 3)
    expected = torch.addmm(bias.bfloat16(), x.bfloat16(), W_enc.bfloat16()).float()
    for s, v in ((selection, values), (batch_selection, batch_values)):
        assert v.dtype == torch.float32
        assert torch.equal(v, expected[s.tokens, s.latents])
    assert not values.requires_grad
