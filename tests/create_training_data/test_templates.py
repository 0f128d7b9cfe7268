"""Texts in a template, cut to what the model reads."""

from __future__ import annotations

import pytest
import torch

from sae_transformers.create_training_data.templates import templated_ids
from tests.create_training_data.words import word_tokenizer

TEXT = "w5 w6 w7 w8 w9 w10"


def test_a_text_that_fits_is_what_the_tokenizer_gives() -> None:
    tokenizer = word_tokenizer()
    found = templated_ids(tokenizer, [TEXT, "w5"], "w1 {text} w2")
    for ids, text in zip(found, (TEXT, "w5"), strict=True):
        assert ids.tolist() == tokenizer(f"w1 {text} w2")["input_ids"]


@pytest.mark.parametrize("length", range(3, 9))
def test_a_long_text_loses_its_end_and_the_template_stays(length: int) -> None:
    tokenizer = word_tokenizer()
    whole = templated_ids(tokenizer, [TEXT], "w1 {text} w2")[0]
    (ids,) = templated_ids(tokenizer, [TEXT], "w1 {text} w2", max_length=length)
    assert len(ids) == min(length, len(whole))
    assert torch.equal(ids[: length - 1], whole[: length - 1])
    assert ids[-1] == whole[-1]


def test_what_cannot_be_read_is_told() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="template alone has 2 tokens"):
        templated_ids(tokenizer, [TEXT], "w1 {text} w2", max_length=1)
    with pytest.raises(ValueError, match="without tokens needs a template"):
        templated_ids(tokenizer, ["w5", ""])
    assert len(templated_ids(tokenizer, [""], "w1 {text}")[0]) == 1
    with pytest.raises(ValueError, match="once"):
        templated_ids(tokenizer, [TEXT], "no place")
