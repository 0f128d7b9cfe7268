"""Clients that take their time, and more of them than are served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from sae_transformers import ServeLimits
from tests.serving.running import STEERINGS, Running, offline, running, served_model, served_tokenizer, settles

RECEIVE_S = 0.8
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MODEL, TOKENIZER = served_model(context=4096), served_tokenizer()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, TOKENIZER, limits=ServeLimits(receive_s=RECEIVE_S)) as made:
        yield made


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def body(**fields: Any) -> bytes:
    raw = json.dumps({"model": "tiny", "prompt": "w1 w2", "max_tokens": 4, **fields}).encode()
    return b"Content-Length: %d\r\n\r\n" % len(raw) + raw


def until_closed(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (HEAD, b"408"),
        (HEAD + b"Content-Length: 50\r\n\r\n", b"408"),
        (HEAD + b'Content-Length: 50\r\n\r\n{"model":', b"408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"408"),
        (HEAD.replace(b"json", b"xml") + b"Content-Length: 50\r\n\r\n{", b"400"),  # answered before its end
    ],
)
def test_what_is_not_sent_in_time_is_not_waited_for(server: Running, sent: bytes, status: bytes) -> None:
    start = time.monotonic()
    with connect(server) as connection:
        connection.sendall(sent)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 " + status), received
    assert time.monotonic() - start > RECEIVE_S * 0.95
    assert server.app.state.traffic.at_work == 0


def test_a_drop_now_and_then_does_not_prolong_the_time(server: Running) -> None:
    start, closed = time.monotonic(), False
    with connect(server) as connection:
        connection.settimeout(0.05)
        while not closed and time.monotonic() - start < 10:
            try:
                connection.sendall(b"X")
                closed = connection.recv(100) != b""
            except TimeoutError:
                pass
            except OSError:
                closed = True
    assert closed


def test_each_request_of_a_connection_has_its_time(server: Running) -> None:
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(HEAD)
            time.sleep(RECEIVE_S / 2)
            connection.sendall(body())
            received = b""
            while not received.endswith(b"}}"):  # head and body may come apart
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        connection.sendall(HEAD)
        assert until_closed(connection).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - start > RECEIVE_S * 0.95


def test_the_second_of_two_requests_that_came_together_has_its_time_too(server: Running) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD + body() + HEAD + b'Content-Length: 50\r\n\r\n{"model":')
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 200") and received.count(b"HTTP/1.1 408") == 1


def test_an_answer_may_take_longer_than_its_request(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    step = server.engine.batch.step

    def slow(tokens: Any) -> Any:
        time.sleep(RECEIVE_S / 4)
        return step(tokens)

    monkeypatch.setattr(server.engine.batch, "step", slow)
    answer = server.openai.completions.create(model="tiny", prompt="w1 w2 w3", max_tokens=7)
    assert answer.choices[0].text == offline(MODEL, TOKENIZER, "w1 w2 w3", None, 7)


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    limits = ServeLimits(receive_s=RECEIVE_S)
    with running(MODEL, TOKENIZER, send_buffer=4096, limits=limits) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(HEAD + body(stream=True, max_tokens=4000))
        assert settles(lambda: server.app.state.traffic.at_work == 1)
        assert settles(lambda: server.app.state.traffic.at_work == 0, within_s=10)
        assert server.app.state.traffic.connections() == 0 and server.idle()
        assert 0 < server.engine.steps < 4000


def test_connections_beyond_the_limit_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_transformers.serving.web.connections.SPARE", 1)
    with running(MODEL, TOKENIZER, limits=ServeLimits(max_connections=2)) as server, ExitStack() as held:
        for number in (1, 2, 3):
            first = held.enter_context(connect(server))
            assert settles(lambda number=number: server.app.state.traffic.connections() == number)
        first.sendall(HEAD + body())
        received = until_closed(first)
        head, _, told = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head.lower()
        assert json.loads(told)["error"]["code"] == "too_many_connections"
        one_more = held.enter_context(connect(server))
        assert settles(lambda: server.app.state.traffic.connections() == 3)
        with connect(server) as beyond:
            assert beyond.recv(100) == b""
        held.close()
        assert one_more.fileno() == -1 and settles(lambda: server.app.state.traffic.connections() == 0)
        assert server.openai.completions.create(model="tiny", prompt="w1", max_tokens=2).choices


@pytest.mark.slow
def test_200_slow_clients_beside_32_steered_streams(server: Running) -> None:
    """All streams say what they say alone, and every slow client has been sent away by then or soon after."""
    variants = [STEERINGS[1 + number % 5] for number in range(32)]

    def ask(number: int) -> str:
        options: Any = {"extra_body": {"steering": variants[number].to_dict()}}
        chunks = server.chat(f"w{number} w1", stream=True, max_tokens=60, **options)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ExitStack() as held, ThreadPoolExecutor(32) as pool:
        slow = [held.enter_context(connect(server)) for _ in range(200)]
        for number, connection in enumerate(slow):
            connection.sendall(HEAD if number % 2 else HEAD + b"Content-Length: 500\r\n\r\n{")
        found = list(pool.map(ask, range(32)))
        assert {until_closed(connection)[:12] for connection in slow} == {b"HTTP/1.1 408"}
    for number, text in enumerate(found):
        assert text == offline(MODEL, TOKENIZER, f"w{number} w1", variants[number], 60), number
    assert settles(lambda: server.app.state.traffic.connections() <= 32)
