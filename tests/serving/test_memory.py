"""Memory that is counted, and memory that runs out: only what must end does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sae_transformers import ServeLimits
from sae_transformers.serving.engine import Engine
from sae_transformers.serving.memory import CacheBudget, free_bytes, is_out_of_memory
from tests.serving.running import STEERINGS, offline, running, served_model, served_tokenizer
from tests.serving.test_engine import Asked

MODEL, TOKENIZER = served_model(context=2048), served_tokenizer()
TOKEN_BYTES = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32


@contextmanager
def engine(**options: Any) -> Iterator[Engine]:
    made = Engine(MODEL, TOKENIZER, **{"max_concurrent": 6, **options})
    made.start()
    yield made
    made.stop()


def written_whole(asked: list[Asked], tokens: int) -> bool:
    texts = [TOKENIZER.decode(one.answer.prompt) for one in asked]
    expected = [offline(MODEL, TOKENIZER, t, one.answer.steering, tokens) for t, one in zip(texts, asked, strict=True)]
    return [(one.ended().text, one.finish) for one in asked] == [(text, "length") for text in expected]


def several(count: int, tokens: int) -> list[Asked]:
    return [Asked(STEERINGS[i % 6], f"w{i} w{i + 1}", tokens) for i in range(count)]


def test_what_has_no_room_is_set_aside_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six answers grow out of the room for two and a half: all end as they would alone."""
    with engine(cache_bytes=int(TOKEN_BYTES * 42 * 2.5)) as made:
        join, read_again, largest = made.batch.join, [], []

        def watched(prompts: Any, steerings: Any, written: Any = ()) -> Any:
            read_again.extend(len(more) for more in written if more)
            return join(prompts, steerings, written)

        monkeypatch.setattr(made.batch, "join", watched)
        asked = several(6, 40)
        asked[0].each = lambda: largest.append(made.batch.cache_bytes)
        made.submit([one.answer for one in asked])
        assert written_whole(asked, 40)
        assert read_again and made.budget.per_token == TOKEN_BYTES
        assert max(largest) <= made.budget.limit


def test_an_answer_that_has_no_room_alone_is_told_so() -> None:
    with engine(cache_bytes=TOKEN_BYTES * 30) as made:
        (long,), (short,) = several(1, 60), several(1, 20)
        made.submit([long.answer, short.answer])
        assert long.ended().finish == "error" and 20 < len(long.answer.tokens) < 30
        error = long.answer.error
        assert error is not None and (error.status, error.code) == (503, "out_of_memory")
        assert "30 tokens have no room" in error.message or "31 tokens have no room" in error.message
        assert written_whole([short], 20)


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("part", ["step", "join"])
def test_running_out_of_memory_ends_no_answer_that_fits(
    part: str, half_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for two rows, which nothing knows beforehand; the cache may be left half changed."""
    with engine() as made:
        action, failures = getattr(made.batch, part), []

        def short_of_memory(*arguments: Any) -> Any:
            rows = len(made.batch) + (len(arguments[0]) if part == "join" else 0)
            if rows > 2:
                failures.append(rows)
                if half_way:
                    action(*arguments)
                    made.batch.clear() if part == "join" else None
                raise torch.OutOfMemoryError("no more")
            return action(*arguments)

        monkeypatch.setattr(made.batch, part, short_of_memory)
        asked = several(6, 12)
        made.submit([one.answer for one in asked])
        assert written_whole(asked, 12)
        assert 1 <= len(failures) < 30 and failures[0] == 6


def test_memory_that_lasts_for_nobody_fails_all_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as made:
        step = made.batch.step

        def never(tokens: Any) -> Any:
            raise torch.OutOfMemoryError("no more")

        monkeypatch.setattr("sae_transformers.serving.engine.logger.error", lambda text, exc_info: None)
        monkeypatch.setattr(made.batch, "step", never)
        asked = several(3, 30)
        made.submit([one.answer for one in asked])
        assert [one.ended().finish for one in asked] == ["error"] * 3
        monkeypatch.setattr(made.batch, "step", step)
        again = several(3, 8)
        made.submit([one.answer for one in again])
        assert written_whole(again, 8)


def test_what_running_out_looks_like() -> None:
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("size mismatch"), ValueError("out of memory"), KeyError()):
        assert not is_out_of_memory(error)


def test_a_budget_counts_rows_by_columns() -> None:
    budget = CacheBudget(1000)
    assert budget.holds(10**6, 10**6)  # nothing is known yet
    budget.per_token = 2.5
    assert budget.holds(20, 20) and not budget.holds(20, 21)
    assert CacheBudget(None, 2.5).holds(10**6, 10**6)


def test_free_memory_of_this_machine() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None and 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None


def test_a_detection_without_memory_for_all_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"w{number} w3 w4" for number in range(9)]
    body = {"model": "tiny", "input": texts, "feature": 9}
    with running(MODEL, TOKENIZER, limits=ServeLimits(cache_gib=1.0)) as server:
        whole = server.post("/detect", body).json()
        detect, most = MODEL.detect, [3]

        def short_of_memory(batch: Any, **options: Any) -> Any:
            if len(batch["input_ids"]) > most[0]:
                raise torch.OutOfMemoryError("no more")
            return detect(batch, **options)

        monkeypatch.setattr(MODEL, "detect", short_of_memory)
        parts = server.post("/detect", body).json()
        assert [one["index"] for one in parts["data"]] == list(range(9))
        assert [p["score"] for p in parts["data"]] == pytest.approx([p["score"] for p in whole["data"]], abs=1e-5)
        most[0] = 0
        answer = server.post("/detect", body)
        assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
