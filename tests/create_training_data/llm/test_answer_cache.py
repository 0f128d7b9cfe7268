"""The file of answers: its descriptor is given back, whoever forgets to close it and whatever fails."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from sae_transformers.create_training_data.llm.requests import Answer, AnswerCache

DESCRIPTORS = Path("/proc/self/fd")
pytestmark = pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="needs /proc to count descriptors")


def opened(path: Path) -> int:
    """How many descriptors of this process are of that file."""
    return sum(os.path.realpath(entry) == str(path) for entry in DESCRIPTORS.iterdir())


def test_it_is_closed_once_and_opened_again(tmp_path: Path) -> None:
    cache, path = AnswerCache(tmp_path), tmp_path / "answers.jsonl"
    for key in ("one", "two"):
        cache.put(key, Answer("yes"))
        assert opened(path) == 1
        cache.close()
        cache.close()
        assert opened(path) == 0
    assert len(AnswerCache(tmp_path)) == 2


def test_nobody_closed_it(tmp_path: Path) -> None:
    cache, path = AnswerCache(tmp_path), tmp_path / "answers.jsonl"
    cache.put("one", Answer("yes"))
    assert opened(path) == 1
    del cache
    gc.collect()
    assert opened(path) == 0


def test_the_file_can_be_opened_but_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key": "half')

    def broken(*args: object) -> bytes:
        raise OSError(5, "Input/output error")

    cache = AnswerCache(tmp_path)
    monkeypatch.setattr(os, "pread", broken)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            cache.put("one", Answer("yes"))
    assert opened(path) == 0


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match=r"answers\.jsonl.*is a pipe"):
        AnswerCache(tmp_path)
