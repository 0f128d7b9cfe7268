"""Texts become tokens in several threads at once, and too long ones never do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sae_transformers.serving.bodies import Body
from sae_transformers.serving.detecting import read_detection
from sae_transformers.serving.errors import RequestError
from sae_transformers.serving.requests import Reader
from sae_transformers.serving.tokenizing import Tokenizing
from tests.serving.running import served_model, served_tokenizer

MODEL = served_model()
LONGEST = len("<pad>")
BOTH_AT_WORK = threading.Barrier(2)


class SlowTokenizer:
    """One that only a single thread may use at a time, as those are that are written in Python."""

    is_fast = False
    chat_template = None

    def __init__(self) -> None:
        self.at_work, self.overlapped = 0, False

    def __deepcopy__(self, _: Any) -> SlowTokenizer:
        return SlowTokenizer()

    def get_vocab(self) -> dict[str, int]:
        return {"ab": 0, "c": 1}

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        self.at_work += 1
        self.overlapped |= self.at_work > 1
        if text == "meet":
            BOTH_AT_WORK.wait(timeout=10)
        self.at_work -= 1
        if self.overlapped:
            raise RuntimeError("two threads in one tokenizer")
        return {"input_ids": [len(text)]}


def test_the_most_characters_are_those_of_the_longest_tokens() -> None:
    assert Tokenizing(served_tokenizer(), 128).most_characters == 128 * (LONGEST + 1)
    assert Tokenizing(SlowTokenizer(), 10).most_characters == 10 * 3


def test_two_threads_use_two_copies_of_a_slow_tokenizer() -> None:
    tokenizing = Tokenizing(SlowTokenizer(), 10)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(tokenizing.ids, ["meet", "meet"])) == [[4], [4]]
    assert tokenizing.ids("alone") == [5]


def test_settings_of_the_original_do_not_reach_the_servers_copy() -> None:
    tokenizer = served_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizing = Tokenizing(tokenizer, 128)
    assert len(tokenizing.ids("w1 w2 w3")) == 3
    tokenizer("w1 w2 w3", padding="max_length", truncation=True, max_length=9)  # its owner goes on using it
    with ThreadPoolExecutor(8) as pool:
        texts = [" ".join(f"w{(i + j) % 90}" for j in range(60)) for i in range(200)]
        assert list(pool.map(tokenizing.ids, texts)) == [[4 + (i + j) % 90 for j in range(60)] for i in range(200)]


def refused(read: Any, body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as error:
        read(Body({"model": "tiny", **body}))
    return error.value


def test_a_text_that_cannot_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = served_tokenizer()
    reader = Reader(MODEL, tokenizer, ["tiny"], 8)
    most = 128 * (LONGEST + 1)

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("worked on it")

    monkeypatch.setattr(reader.tokenizing, "ids", worked)
    chat = {"messages": [{"role": "user", "content": "w1 " * 128}, {"role": "user", "content": "w1 " * 129}]}
    texts = ["w1", "w1 " * (most // 3 + 1)]
    template = {"messages": [{"role": "user", "content": "w1"}], "chat_template_kwargs": {"extra": "w" * most}}
    for read, body, param in (
        (reader.chat, chat, "messages"),
        (reader.chat, template, "messages"),
        (reader.completion, {"prompt": texts[1]}, "prompt"),
        (lambda body: read_detection(reader, body), {"input": texts, "feature": 3}, "input[1]"),
    ):
        error = refused(read, body)
        assert (error.status, error.code, error.param) == (400, "context_length_exceeded", param)
        assert f"{most} are the most that can fit" in error.message and "128 tokens" in error.message


def test_of_a_long_text_the_beginning_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_transformers.serving.tokenizing.CHARACTERS_A_TOKEN", 5)
    reader, worked = Reader(MODEL, served_tokenizer(), ["tiny"], 8), []
    ids = reader.tokenizing.ids

    def watched(text: str, **options: bool) -> list[int]:
        worked.append(len(text))
        return ids(text, **options)

    monkeypatch.setattr(reader.tokenizing, "ids", watched)
    long = "w1 " * 250
    for read, body, param in (
        (reader.completion, {"prompt": long}, "prompt"),
        (reader.chat, {"messages": [{"role": "user", "content": long}]}, "messages"),
    ):
        error = refused(read, body)
        assert (error.code, error.param) == ("context_length_exceeded", param)
        assert "128 tokens" in error.message and "beginning" in error.message
    assert worked == [5 * 128] * 2
    assert len(reader.encode("<pad> " * 120, "prompt")) == 120  # which has more characters and fits


def test_a_text_of_the_longest_tokens_is_read() -> None:
    reader = Reader(MODEL, served_tokenizer(), ["tiny"], 8)
    assert len(reader.encode("<pad> " * 128, "prompt")) == 128


def test_the_tokens_of_a_detection_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_transformers.serving.detecting.MAX_TOKENS", 10)
    reader = Reader(MODEL, served_tokenizer(), ["tiny"], 8)
    texts = ["w1 w2 w3 w4 w5"] * 2
    assert len(read_detection(reader, Body({"model": "tiny", "input": texts, "feature": 3})).ids) == 2
    error = refused(lambda body: read_detection(reader, body), {"input": [*texts, "w1 w2", "w1 w2"], "feature": 3})
    assert error.param == "input" and "at most 10 tokens in all" in error.message and "in 3 texts" in error.message
