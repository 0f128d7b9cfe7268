"""`convert` and `load_base` as functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_transformers import SparseAutoencoder, convert, load_base
from sae_transformers.workflows.loading import load_sae
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae


def test_a_copy_is_compared_on_hidden_states_of_the_base(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    tiny_sae(layer=1).save_pretrained(tmp_path / "sae")
    base, tokenizer, name = load_base(tmp_path / "base")
    assert name == str(tmp_path / "base") and not base.training
    found = convert(tmp_path / "sae", tmp_path / "copy", "saelens", model=base, tokenizer=tokenizer)
    assert found.difference < 1e-5 and found.l0 == 8 and str(tmp_path / "base") in found.summary()[0]
    copy = SparseAutoencoder.from_pretrained(tmp_path / "copy")
    torch.testing.assert_close(copy.W_dec, tiny_sae(layer=1).W_dec)
    rows = convert(copy, tmp_path / "again", probe=torch.randn(4, 32))
    assert "on the given rows" in rows.summary()[0] and rows.to_dict()["source"].startswith("saelens: topk (k=8)")
    assert "on Gaussian rows" in convert(copy, tmp_path / "third").summary()[0]
    with pytest.raises(ValueError, match="`model` needs its `tokenizer`: .* Received: tokenizer=None"):
        convert(copy, tmp_path / "fourth", model=base)
    assert not (tmp_path / "fourth").exists()


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    tiny_sae(layer=1).save_pretrained(tmp_path / "sae")
    assert load_sae(str(tmp_path / "sae"), "layers.0.resid_post", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16. Received: dtype='int8'"):
        load_sae(str(tmp_path / "sae"), dtype="int8")
    with pytest.raises(ValueError, match="`model_dtype` must be one of auto"):
        load_base("x", model_dtype="int8")
