"""Pieces of text add up to what the tokenizer decodes at once, and stop texts are found wherever they are cut."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_transformers.serving.answer_text import StopTexts, TokensToText
from tests.create_training_data.words import word_tokenizer


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as byte-level BPE without merges, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "</s>"])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


TOKENIZERS = {"words": word_tokenizer, "bytes": bytes_tokenizer}
TEXTS = ["a plain text", "Größe, 中文 and 👩‍👩‍👧 family", "end 👍", "\u2603"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_add_up(kind: str) -> None:
    tokenizer, draw = TOKENIZERS[kind](), random.Random(0)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS] if kind == "bytes" else []
    rows += [[draw.randrange(len(tokenizer)) for _ in range(60)] for _ in range(30)]  # broken characters too
    for ids in rows:
        decoder = TokensToText(tokenizer)
        pieces = [decoder.push(token) for token in ids]
        assert "".join([*pieces, decoder.finish()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_is_never_cut() -> None:
    tokenizer = bytes_tokenizer()
    decoder = TokensToText(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer("é中👍")["input_ids"]]
    assert [piece for piece in pieces if piece] == ["é", "中", "👍"] and decoder.finish() == ""


@pytest.mark.parametrize(("stop", "expected"), [(["END"], "abEN"), (["bE", "N"], "a"), (["zz"], None), (["Dx"], None)])
def test_stop_texts_at_every_cut(stop: list[str], expected: str | None) -> None:
    text = "abENENDcd"
    for count in range(4):
        for cuts in itertools.combinations(range(1, len(text)), count):
            bounds = [0, *cuts, len(text)]
            cutter, told = StopTexts(stop), ""
            for start, end in itertools.pairwise(bounds):
                told += cutter.push(text[start:end])
                assert (expected if expected is not None else text).startswith(told)
            assert cutter.found == (expected is not None)
            assert told + cutter.finish() == (text if expected is None else expected)


def test_only_what_may_be_a_stop_is_held_back() -> None:
    cutter = StopTexts(["<end>"])
    assert [cutter.push(piece) for piece in ("a<", "e", "x<en", "d")] == ["a", "", "<ex", ""]
    assert cutter.finish() == "<end" and StopTexts(()).push("a<") == "a<"
