"""The unembedding of every family equals what its model does, and tokens look as people write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from sae_transformers.evaluation.features.unembedding import (
    final_norm,
    matching_tokens,
    norm_gain,
    token_texts,
    unembedding,
)
from tests.create_training_data.words import word_tokenizer
from tests.tiny import ARCHITECTURES, VOCAB, WIDTH, tiny_base, tiny_model

F64 = torch.float64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: every byte, and a few merged words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("c", "a"), ("Ġc", "a"), ("Ã", "©")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like: `▁` for a space."""
    raw = Tokenizer(models.WordLevel({"▁cat": 0, "cat": 1, "<unk>": 2, "▁": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_logits_are_the_models(architecture: str) -> None:
    """Of two states of one length, which the norm divides alike, the logits differ as the matrix says."""
    base = tiny_base(architecture, dtype=F64)
    with torch.no_grad():
        for parameter in final_norm(base).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=F64) * 0.3)
    W_U = unembedding(base, centre=False)
    gain, subtracts_mean = norm_gain(final_norm(base))
    states = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5), dtype=F64) * 1e4
    if subtracts_mean:
        states -= states.mean(-1, keepdim=True)
    states *= 1e4 / states.square().mean(-1, keepdim=True).sqrt()  # one length
    with torch.no_grad():
        normed = final_norm(base)(states)
        logits = normed @ base.get_output_embeddings().weight.T
    expected = (states[0] - states[1]) @ W_U / 1e4
    torch.testing.assert_close(logits[0] - logits[1], expected.to(F64), rtol=1e-4, atol=1e-5)
    assert W_U.shape == (WIDTH, VOCAB)


def test_gains_are_found_however_they_are_written() -> None:
    assert norm_gain(torch.nn.LayerNorm(7, dtype=F64))[1]
    norm = torch.nn.LayerNorm(7)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(7.0) - 3)
        norm.bias.fill_(5.0)
    gain, subtracts_mean = norm_gain(norm)
    torch.testing.assert_close(gain, torch.arange(7, dtype=F64) - 3, rtol=1e-6, atol=1e-6)
    assert subtracts_mean
    gemma: Any = final_norm(tiny_base("gemma2"))
    with torch.no_grad():
        gemma.weight.copy_(torch.linspace(-0.5, 0.5, WIDTH))
    gain, subtracts_mean = norm_gain(gemma)
    torch.testing.assert_close(gain, 1 + torch.linspace(-0.5, 0.5, WIDTH).double(), rtol=1e-6, atol=1e-6)
    assert not subtracts_mean


def test_centring_takes_out_the_mean_and_nothing_else() -> None:
    base = tiny_base("gpt2")
    plain, centred = (unembedding(base, centre=centre) for centre in (False, True))
    assert float(centred.mean(1).abs().max()) < 1e-7
    torch.testing.assert_close(centred, plain - plain.mean(1, keepdim=True))
    some = torch.tensor([5, 0, 7])
    torch.testing.assert_close(unembedding(base, centre=False, vocabulary=some), plain[:, some])
    assert float(unembedding(base, vocabulary=some).mean(1).abs().max()) < 1e-7


def test_of_a_model_with_saes_and_the_base_is_left_alone() -> None:
    model = tiny_model()
    before = model.lm.get_output_embeddings().weight.detach().clone()
    torch.testing.assert_close(unembedding(model), unembedding(model.lm))
    assert torch.equal(before, model.lm.get_output_embeddings().weight)


def test_models_without_one() -> None:
    base = tiny_base("gpt2")
    with pytest.raises(ValueError, match="GPT2Model, which has none"):
        unembedding(AutoModel.from_config(base.config))
    with pytest.raises(ValueError, match=r"32 wide.*\(99, 16\)"):
        unembedding(tiny_base("opt", word_embed_proj_dim=16))
    with pytest.raises(ValueError, match="Received: none"):
        unembedding(base, vocabulary=torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[0, 99\). Received: 4 to 99"):
        unembedding(base, vocabulary=torch.tensor([4, 99]))
    base.transformer.ln_f = None
    with pytest.raises(ValueError, match="fold_norm=False"):
        unembedding(base)
    assert unembedding(base, fold_norm=False).shape == (WIDTH, VOCAB)


def test_byte_level_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids: Any = tokenizer.convert_tokens_to_ids(["Ġca", "ca", "Ã©", "Ã", "Ċ", "<end>"])
    assert token_texts(tokenizer, [*ids, 9999]) == [" ca", "ca", "é", "<0xC3>", "\n", "<end>", "<id 9999>"]


def test_pieces_and_words() -> None:
    assert token_texts(piece_tokenizer(), [0, 1, 3]) == [" cat", "cat", " "]
    assert token_texts(word_tokenizer(), [4, 0, 4]) == ["w0", "<pad>", "w0"]


def test_matching_tokens() -> None:
    assert matching_tokens(word_tokenizer(), None, 10).tolist() == list(range(10))
    assert len(matching_tokens(word_tokenizer(), None, 999)) == 94
    assert matching_tokens(byte_tokenizer(), "^ c", 999).tolist() == byte_tokenizer().convert_tokens_to_ids(
        ["Ġc", "Ġca"]
    )


def test_an_unembedding_without_weight() -> None:
    fake = SimpleNamespace(get_output_embeddings=lambda: None)
    with pytest.raises(ValueError, match="SimpleNamespace"):
        unembedding(fake)
