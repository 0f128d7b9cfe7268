"""The end of a server: answers under way have their time after SIGTERM, and no more are taken."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from sae_transformers import ServeLimits
from sae_transformers.serving.app import build_app
from sae_transformers.serving.listening import Listener, bind, listener
from tests.serving.running import Running, offline, served_model, served_tokenizer, settles

MODEL, TOKENIZER = served_model(context=4096), served_tokenizer()


class Ending:
    """A server whose process is sent signals."""

    def __init__(self, listener: Listener, running: Running, thread: threading.Thread) -> None:
        self.listener, self.running, self.thread = listener, running, thread

    def signal(self, number: int) -> None:
        self.listener.handle_exit(number, None)

    def ends(self, within_s: float = 20) -> bool:
        self.thread.join(within_s)
        return not self.thread.is_alive()


@pytest.fixture
def ending(request: pytest.FixtureRequest) -> Iterator[Ending]:
    app = build_app(MODEL, TOKENIZER, "tiny", limits=ServeLimits(drain_s=request.param))
    with bind("127.0.0.1", 0) as socket:
        server = listener(app, "error")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        assert settles(lambda: server.started)
        made = Running(app, socket.getsockname()[1], "none")
        with made.openai:
            yield Ending(server, made, thread)
        server.should_exit = True
        thread.join()


def slowed(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Stops the engine before each token but the first, until the event is set."""
    goes_on, step = threading.Event(), ending.running.engine.batch.step

    def slow(tokens: Any) -> Any:
        goes_on.wait(0.05)
        return step(tokens)

    monkeypatch.setattr(ending.running.engine.batch, "step", slow)
    return goes_on


@pytest.mark.parametrize("ending", [60.0], indirect=True)
def test_answers_under_way_end_and_others_are_sent_away(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, server = slowed(ending, monkeypatch), ending.running
    stream = server.chat("w1 w2 w3", stream=True, max_tokens=40)
    text = next(iter(stream)).choices[0].delta.content or ""
    ending.signal(signal.SIGTERM)
    assert settles(lambda: server.request("GET", "/ready").status == 503, within_s=10)
    assert server.get("/ready") == {"status": "draining"} and server.get("/health")["status"] == "ok"
    with pytest.raises(openai.InternalServerError) as refused:
        server.chat("w1")
    assert refused.value.status_code == 503 and refused.value.code == "stopping"
    assert refused.value.response.headers["Retry-After"] == "1"
    assert not ending.ends(within_s=0.1)
    goes_on.set()
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == offline(MODEL, TOKENIZER, "w1 w2 w3", None, 40)
    assert ending.ends()


@pytest.mark.parametrize("ending", [0.3], indirect=True)
def test_what_does_not_end_in_time_is_told_so(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(ending, monkeypatch)
    stream = ending.running.chat("w1 w2 w3", stream=True, max_tokens=4000)
    next(iter(stream))
    start = time.monotonic()
    ending.signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="The server is stopping"):
        list(stream)
    assert time.monotonic() - start > 0.25 and ending.ends()


@pytest.mark.parametrize("ending", [60.0], indirect=True)
@pytest.mark.parametrize("first", [[], [signal.SIGTERM]], ids=["alone", "after another"])
def test_ctrl_c_and_a_second_signal_end_it_at_once(
    ending: Ending, monkeypatch: pytest.MonkeyPatch, first: list[int]
) -> None:
    slowed(ending, monkeypatch)
    stream = ending.running.chat("w1 w2 w3", stream=True, max_tokens=4000)
    next(iter(stream))
    for number in [*first, signal.SIGTERM if first else signal.SIGINT]:
        ending.signal(number)
    with pytest.raises(openai.APIError, match="The server is stopping"):
        list(stream)
    assert ending.ends()


@pytest.mark.parametrize("ending", [60.0], indirect=True)
def test_nothing_under_way_is_not_waited_for(ending: Ending) -> None:
    ending.running.chat("w1")
    ending.signal(signal.SIGTERM)
    assert ending.ends()
