"""Texts in a template, cut to what the model reads."""

from __future__ import annotations

import pytest
import torch

from sae_transformers.create_training_data.template_texts import TASKS, full_template
from sae_transformers.create_training_data.templates import templated_ids, templated_texts
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


@pytest.mark.parametrize("length", [4, 5, 256])
def test_the_prefix_is_counted_in_each_row(length: int) -> None:
    tokenizer = word_tokenizer()
    rows = templated_texts(tokenizer, [TEXT, "w5", ""], "w1 w2 {text} w3", max_length=length)
    assert [row.prefix for row in rows] == [2, 2, 2]
    for row in rows[:2]:
        assert row.ids[row.prefix] == tokenizer("w5")["input_ids"][0]
    assert [row.prefix for row in templated_texts(tokenizer, [TEXT], "{text} w1")] == [0]


def test_a_task_by_name_is_a_turn_of_the_chat_where_there_is_one() -> None:
    tokenizer = word_tokenizer()
    assert full_template("toxicity", tokenizer) == TASKS["toxicity"]
    tokenizer.chat_template = "{% for turn in messages %}[{{ turn.content }}]{% endfor %}>"
    for name, words in TASKS.items():
        assert full_template(name, tokenizer) == f"[{words}]>"
    assert full_template("a {text}", tokenizer) == "a {text}"
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="take a user's turn once. Received: 'nothing'"):
        full_template("disease", tokenizer)
