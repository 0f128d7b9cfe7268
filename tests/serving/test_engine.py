"""The engine alone: who shares a batch, who waits, what fails and what is freed."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Steering
from sae_transformers.serving.engine import Answer, Engine
from sae_transformers.serving.errors import RequestError
from sae_transformers.serving.sampling import Sampling
from tests.serving.running import STEERINGS, offline, served_model, served_tokenizer

MODEL, TOKENIZER = served_model(context=2048), served_tokenizer()


class Asked:
    """An answer and what the engine says of it."""

    each: Callable[[], object] | None = None  # called in the engine's thread, at each piece of text

    def __init__(self, steering: Steering = STEERINGS[0], text: str = "w1 w2 w3", tokens: int = 6, **options) -> None:
        self.text, self.finish, self.events = "", None, queue.Queue()
        ids = TOKENIZER(text)["input_ids"]
        self.answer = Answer(ids, steering, Sampling(tokens, **options), TOKENIZER, self.report)

    def report(self, answer: Answer, piece: str, finish: str | None) -> None:
        self.text += piece
        if self.each is not None:
            self.each()
        self.events.put(piece)
        if finish:
            self.finish = finish
            self.events.put(None)

    def ended(self) -> Any:
        while self.events.get(timeout=30) is not None:
            pass
        return self


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(MODEL, TOKENIZER, max_concurrent=4)
    made.start()
    yield made
    made.stop()
    assert not made.is_alive and made.batch.cache is None


def test_more_than_there_is_room_for(engine: Engine) -> None:
    asked = [Asked(STEERINGS[i % 6], f"w{i} w{i + 1}", 1 + i % 5) for i in range(11)]
    engine.submit([one.answer for one in asked])
    for i, one in enumerate(asked):
        expected = offline(MODEL, TOKENIZER, f"w{i} w{i + 1}", STEERINGS[i % 6], 1 + i % 5)
        assert (one.ended().text, one.finish) == (expected, "length")
    assert engine.steps < 11 * 3  # together, not one by one


def test_those_that_exclude_each_other_take_turns(engine: Engine) -> None:
    scores = [float(i % 3) for i in range(64)]
    kinds = [Steering([FeatureReweighting(scores=scores, mode=mode)]) for mode in ("swap", "weight")]
    kinds.append(Steering([FeatureEdit(feature=3, op="set", value=2.0)], balance=True))
    asked = [Asked(kinds[i % 3]) for i in range(6)]
    engine.submit([one.answer for one in asked])
    for i, one in enumerate(asked):
        assert one.ended().text == offline(MODEL, TOKENIZER, "w1 w2 w3", kinds[i % 3], 6)


def test_a_stop_text_ends_before_it(engine: Engine) -> None:
    whole = offline(MODEL, TOKENIZER, "w1 w2 w3", None, 6)
    word = whole.split()[3]
    asked = Asked(stop=(word,))
    engine.submit([asked.answer])
    assert asked.ended().finish == "stop" and asked.text == whole[: whole.index(word)]
    assert len(asked.answer.tokens) == 4


def test_what_is_cancelled_is_freed_while_others_go_on(engine: Engine) -> None:
    dropped, other = Asked(tokens=1500), Asked(tokens=20, text="w5")
    rows, shared, freed = [], [], []

    def watch() -> None:
        keys = engine.batch.cache.layers[0].keys
        rows.append(len(keys))
        if len(rows) <= 5:
            shared.append(weakref.ref(keys))
        else:
            freed.append(all(keys() is None for keys in shared))
        if len(rows) == 5:
            dropped.answer.cancel()

    other.each = watch
    engine.submit([dropped.answer, other.answer])
    assert other.ended().text == offline(MODEL, TOKENIZER, "w5", None, 20)
    assert rows == [2] * 5 + [1] * 15
    assert dropped.finish is None and len(dropped.answer.tokens) == 5
    assert freed == [True] * 15


def test_a_failing_pass_fails_its_answers_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_transformers.serving.engine.logger.error", lambda text, exc_info: None)
    running = Asked(tokens=100)  # the other one is tried again when it has ended
    engine.submit([running.answer])
    running.events.get(timeout=30)
    join = engine.batch.join

    def broken(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(engine.batch, "join", broken)
    failed = Asked()
    engine.submit([failed.answer])
    assert failed.ended().finish == "error" and failed.answer.error is not None
    assert failed.answer.error.status == 503 and "memory" in failed.answer.error.message
    monkeypatch.setattr(engine.batch, "join", join)
    assert running.ended().finish == "length"
    step = engine.batch.step

    def broken_step(tokens: Any) -> Any:
        raise RuntimeError("a detail of the machine")

    monkeypatch.setattr(engine.batch, "step", broken_step)
    failed = Asked()
    engine.submit([failed.answer])
    assert failed.ended().finish == "error" and failed.answer.error is not None
    assert failed.answer.error.status == 500 and "detail" not in failed.answer.error.message
    monkeypatch.setattr(engine.batch, "step", step)
    again = Asked()
    engine.submit([again.answer])
    assert again.ended().text == offline(MODEL, TOKENIZER, "w1 w2 w3", None, 6)


def test_a_failing_choice_fails_its_answer_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_transformers.serving.engine.logger.error", lambda text, exc_info: None)
    failed, other, drawn = Asked(temperature=1.0), Asked(), Asked(temperature=1e-5)

    def broken(logits: Any, written: Any) -> Any:
        raise IndexError("a detail")

    monkeypatch.setattr(failed.answer.choice, "scores", broken)
    engine.submit([failed.answer, other.answer, drawn.answer])
    assert other.ended().text == drawn.ended().text == offline(MODEL, TOKENIZER, "w1 w2 w3", None, 6)
    assert failed.ended().finish == "error"


def test_steering_that_breaks_the_numbers_fails_alone(engine: Engine) -> None:
    strong = Asked(Steering([FeatureEdit(feature=3, op="add", value=3e38)] * 2))
    other = Asked(STEERINGS[1])
    engine.submit([strong.answer, other.answer])
    assert other.ended().text == offline(MODEL, TOKENIZER, "w1 w2 w3", STEERINGS[1], 6)
    error = strong.ended().answer.error
    assert error is not None and "too strong" in error.message and error.status == 400


def test_stopping_tells_those_that_wait() -> None:
    engine = Engine(MODEL, TOKENIZER, max_concurrent=1)
    with pytest.raises(RequestError, match="stopping"):
        engine.submit([Asked().answer])
    engine.start()
    asked = [Asked(tokens=1500), Asked()]
    engine.submit([one.answer for one in asked])
    asked[0].events.get(timeout=30)
    engine.stop()
    assert [one.ended().finish for one in asked] == ["error", "error"]
    assert asked[1].answer.error is not None and asked[1].answer.error.status == 503


def test_an_engine_that_fails_itself_ends_what_waits_for_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("a fault of the engine")

    monkeypatch.setattr(engine.batch, "fits", fail)
    asked = [Asked(), Asked()]
    engine.submit([one.answer for one in asked])
    for one in asked:
        assert one.ended().finish == "error"
        error = one.answer.error
        assert error is not None and error.code == "model_failed"
    with pytest.raises(RequestError):
        engine.submit([Asked().answer])


def test_rows_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_concurrent=0"):
        Engine(MODEL, TOKENIZER, max_concurrent=0)
