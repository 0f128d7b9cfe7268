"""States of texts for statistics: which tokens count, and which texts are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_transformers.latents.hidden_states import HiddenStateReader
from sae_transformers.latents.text_states import read_text_states
from sae_transformers.latents.texts import read_column
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base

PLACE = "layers.1.resid_post"


def reader(model=None) -> HiddenStateReader:
    return HiddenStateReader(model or tiny_base(vocab_size=94), [PLACE])


def test_first_tokens_and_short_texts_are_left_out_and_long_ones_cut() -> None:
    base, tokenizer = tiny_base(vocab_size=94), word_tokenizer()
    texts = ["w1 w2 w3", "w4", " ".join(WORDS[:30]), "w5 w6"]
    found = read_text_states(reader(base), tokenizer, texts, max_tokens=10, max_norm=1e6)
    assert found.texts == [texts[0], texts[2], texts[3]] and found.left_out == 1
    assert [len(ids) for ids in found.ids] == [3, 10, 2]
    assert found.text_index.tolist() == [0] * 2 + [1] * 9 + [2]
    first = 0
    for ids in found.ids:
        with torch.no_grad():
            whole = base(input_ids=ids[None], output_hidden_states=True).hidden_states[2][0]
        n = len(ids) - 1
        torch.testing.assert_close(found.hidden[first : first + n], whole[1:], rtol=1e-4, atol=1e-5)
        first += n


def test_outliers_are_left_out_by_the_median_or_a_given_norm() -> None:
    base, tokenizer = tiny_base(vocab_size=94), word_tokenizer()
    with torch.no_grad():
        base.get_input_embeddings().weight[13] *= 1e4  # w9
    texts = ["w1 w2 w9 w3 w4", "w5 w9", "w6 w7 w8"]
    found = read_text_states(reader(base), tokenizer, texts)
    assert found.texts == [texts[0], texts[2]] and found.left_out == 1
    assert found.text_index.tolist() == [0, 0, 0, 1, 1]
    norms = found.hidden.norm(dim=-1)
    assert float(norms.max()) <= found.max_norm < 1e4
    again = read_text_states(reader(base), tokenizer, texts, max_norm=found.max_norm)
    assert torch.equal(again.hidden, found.hidden)
    with pytest.raises(ValueError, match="at most 1e-09. Received: 7, all longer"):
        read_text_states(reader(base), tokenizer, texts, max_norm=1e-9)


def test_bad_input() -> None:
    for texts in ([], ["w1", ""]):
        with pytest.raises(ValueError, match=f"two tokens or more. Received: {len(texts)} texts"):
            read_text_states(reader(), word_tokenizer(), texts)
    with pytest.raises(ValueError, match="max_tokens=1"):
        read_text_states(reader(), word_tokenizer(), ["w1 w2"], max_tokens=1)
    both = HiddenStateReader(tiny_base(vocab_size=94), [PLACE, "layers.0.resid_post"])
    with pytest.raises(ValueError, match="2 places"):
        read_text_states(both, word_tokenizer(), ["w1 w2"])


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("rows.csv", ",0\n0,one\n1,\n2,two\n", None),
        ("rows.csv", "id,text,label\n7,one,0\n8,two,1\n", None),
        ("rows.csv", "a,b\nno,one\nno,two\n", "b"),
        ("rows.jsonl", '{"index": 3, "prompt": "one"}\n{"index": 4, "prompt": "two"}\n', None),
        ("rows.txt", "one\n\n\ntwo\n", None),
    ],
)
def test_the_column_of_the_text(tmp_path: Path, name: str, content: str, column: str | None) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_column(str(tmp_path / name), column) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b\none,two\n", r"Name it. Received: columns \['a', 'b'\]"),
        ("text\n", "Expected rows of text. Received: none"),
        ('text\n" "\n', "Received: none in column 'text'"),
    ],
)
def test_no_text(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "rows.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        read_column(str(tmp_path / "rows.csv"))
