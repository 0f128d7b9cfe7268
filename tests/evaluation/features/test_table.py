"""Logit-weight statistics against the full matrix and scipy-free definitions, and what firing is counted as."""

from __future__ import annotations

import math

import pytest
import torch

from sae_transformers.evaluation.features.table import (
    count_firing,
    decoder_rows,
    feature_table,
    firing_frequency,
    logit_weights,
)
from tests.create_training_data.words import word_tokenizer
from tests.tiny import WIDTH, tiny_base, tiny_sae

F64 = torch.float64


def weights(n: int = 7, d: int = 5, vocab: int = 1001, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=F64), torch.randn(d, vocab, generator=generator, dtype=F64)


@pytest.mark.parametrize("elements_at_once", [1, 2500, 10**9])
@pytest.mark.parametrize(("vocab", "k"), [(1001, 3), (1001, 40), (30, 30), (1, 1)])
def test_equals_the_whole_matrix(elements_at_once: int, vocab: int, k: int) -> None:
    W_dec, W_U = weights(vocab=vocab)
    done: list[int] = []
    found = logit_weights(W_dec, W_U, top_k=k, elements_at_once=elements_at_once, report=done.append)
    P = W_dec @ W_U
    assert sum(done) == len(P)
    torch.testing.assert_close(found.mean, P.mean(-1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.top_weights, P.topk(k).values.float())
    torch.testing.assert_close(found.bottom_weights, P.topk(k, largest=False).values.float())
    torch.testing.assert_close(P.gather(1, found.top_ids).float(), found.top_weights)
    torch.testing.assert_close(P.gather(1, found.bottom_ids).float(), found.bottom_weights)
    assert all(len(set(row)) == k for row in found.top_ids.tolist())
    if vocab > 1:
        z = (P - P.mean(-1, keepdim=True)) / P.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(found.std, P.std(-1, correction=0), rtol=1e-10, atol=0)
        torch.testing.assert_close(found.skewness, z.pow(3).mean(-1), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.kurtosis, z.pow(4).mean(-1), rtol=1e-8, atol=1e-10)


def test_single_precision_is_close_to_double() -> None:
    W_dec, W_U = weights(20, 64, 20_000)
    found, exact = logit_weights(W_dec.float(), W_U.float()), logit_weights(W_dec, W_U)
    for name in ("std", "skewness", "kurtosis"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-5, atol=1e-5)
    assert found.mean.dtype == F64 and found.top_weights.dtype == torch.float32


def test_bfloat16_weights_are_multiplied_in_single_precision() -> None:
    W_dec, W_U = (tensor.bfloat16() for tensor in weights(4, 64, 500))
    found = logit_weights(W_dec, W_U)
    torch.testing.assert_close(found.std, (W_dec.double() @ W_U.double()).std(-1, correction=0), rtol=1e-5, atol=1e-6)


def test_a_row_that_does_not_vary_has_no_shape() -> None:
    found = logit_weights(
        torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]]), top_k=1
    )
    assert found.std.tolist() == [0.0, 0.0]
    assert all(math.isnan(x) for x in [*found.skewness.tolist(), *found.kurtosis.tolist()])


def test_columns_may_be_any_tokens() -> None:
    W_dec, W_U = weights(vocab=50)
    chosen = torch.arange(0, 50, 3)
    found = logit_weights(W_dec, W_U[:, chosen], top_k=4, vocabulary=chosen)
    assert set(found.top_ids.flatten().tolist()) <= set(chosen.tolist())
    torch.testing.assert_close((W_dec @ W_U).gather(1, found.top_ids).float(), found.top_weights)


@pytest.mark.parametrize(
    ("W_dec", "W_U", "k", "told"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), 1, r"Received: \(2, 3\) and \(4, 5\)"),
        (torch.ones(2, 3), torch.ones(3, 0), 1, r"\(3, 0\)"),
        (torch.ones(2, 3), torch.ones(3, 5), 6, r"in \[1, 5\].*top_k=6"),
        (torch.full((2, 3), torch.nan), torch.ones(3, 5), 1, "must be finite"),
    ],
)
def test_bad_weights(W_dec: torch.Tensor, W_U: torch.Tensor, k: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        logit_weights(W_dec, W_U, top_k=k)


def test_a_table_of_a_model() -> None:
    base, sae = tiny_base(), tiny_sae(layer=1)
    table = feature_table(base, word_tokenizer(), sae, top_k=3, fold_norm=False, centre=False)
    P = sae.W_dec.detach() @ base.lm_head.weight.detach().T[:, :94]  # the tokenizer has 94 of 99
    torch.testing.assert_close(table.weights.top_weights, P.topk(3).values, rtol=1e-5, atol=1e-6)
    assert table.weights.top_ids.tolist() == P.topk(3).indices.tolist()
    assert table.top_tokens[5] == word_tokenizer().convert_ids_to_tokens(P[5].topk(3).indices.tolist())
    assert table.bottom_tokens[9] == word_tokenizer().convert_ids_to_tokens((-P[9]).topk(3).indices.tolist())
    assert len(table) == 64
    assert table.facts == {
        "unit": "hidden state", "place": "layers.1.resid_post", "transcoder": False, "fold_norm": False,
        "centre": False, "match": None, "tokens": 94, "d_sae": 64,
    }  # fmt: skip


def test_only_matching_tokens() -> None:
    table = feature_table(tiny_base(), word_tokenizer(), tiny_sae(layer=1), top_k=5, match=r"^w[1-3]\d$")
    assert table.facts["tokens"] == 30
    assert all(token[0] == "w" and 10 <= int(token[1:]) < 40 for row in table.top_tokens for token in row)
    with pytest.raises(ValueError, match="none does"):
        feature_table(tiny_base(), word_tokenizer(), tiny_sae(layer=1), match="zebra")
    with pytest.raises(ValueError, match="regular expression"):
        feature_table(tiny_base(), word_tokenizer(), tiny_sae(layer=1), match="(")


def test_normalisation_is_told_and_undone_where_it_is_one_number() -> None:
    plain = decoder_rows(tiny_sae(layer=1), WIDTH)[0]
    scaled, facts = decoder_rows(tiny_sae(layer=1, normalization="scalar", input_scale=4.0), WIDTH)
    torch.testing.assert_close(scaled, plain / 4)
    assert "4" in facts["unit"]
    rows, facts = decoder_rows(tiny_sae(layer=1, normalization="layer_norm"), WIDTH)
    torch.testing.assert_close(rows, plain)
    assert "layer_norm" in facts["unit"]
    transcoder = tiny_sae(layer=1, site="mlp_in", hook_out="layers.1.mlp_out", apply_b_dec_to_input=False)
    assert decoder_rows(transcoder, WIDTH)[1] == {
        "unit": "hidden state", "place": "layers.1.mlp_out", "transcoder": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "width", "told"),
    [
        ({}, 31, "d_out=32"),
        ({"layer": 1, "site": "mlp_in"}, 32, "mlp_in"),
        ({"layer": 0, "site": "attn_heads"}, 32, "heads"),
    ],
)
def test_an_sae_that_does_not_write_into_this_stream(settings: dict, width: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        decoder_rows(tiny_sae(**settings), width)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_firing_equals_dense_counts(activation: str) -> None:
    sae = tiny_sae(activation=activation, layer=0)
    hidden = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    counts, tokens, maxima = count_firing(sae, hidden.split(17), tokens_at_once=8)
    torch.testing.assert_close(maxima, sae.measure_feature_max(hidden))
    assert tokens == 50 and torch.equal(counts, (sae.encode(hidden) != 0).sum(0))
    frequency, dead = firing_frequency(counts, tokens)
    assert dead.tolist() == (counts == 0).tolist()
    torch.testing.assert_close(frequency, (counts.double() / 50 + 1e-10).log10())


def test_frequencies() -> None:
    frequency, dead = firing_frequency(torch.tensor([0, 1, 1000]), 1000)
    assert dead.tolist() == [True, False, False]
    torch.testing.assert_close(frequency, torch.tensor([-10.0, -3.0, 0.0], dtype=F64), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="3, n_tokens=2"):
        firing_frequency(torch.tensor([0, 3]), 2)
    with pytest.raises(ValueError, match="n_tokens=0"):
        firing_frequency(torch.tensor([0, 0]), 0)
