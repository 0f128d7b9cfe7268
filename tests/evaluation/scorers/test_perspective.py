"""The client of Perspective, against a server of our own: what is sent, how often, and what is told when it fails."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sae_transformers.evaluation.scorers.perspective import (
    MOST_BYTES,
    PerspectiveGone,
    PerspectiveRefused,
    PerspectiveScorer,
)

KEY = "AIza-not-a-real-key"


class Service:
    """Answers with the length of the text as its score; `next` holds what becomes of the next requests instead."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.next: deque[tuple[int, dict[str, str], bytes]] = deque()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.bodies.append(body)
                service.keys.append(self.headers["X-Goog-Api-Key"])
                service.paths.append(self.path)
                service.times.append(time.monotonic())
                name = next(iter(body["requestedAttributes"]))
                score = {name: {"summaryScore": {"value": len(body["comment"]["text"]) / 100, "type": "PROBABILITY"}}}
                good = 200, {}, json.dumps({"attributeScores": score, "languages": ["en"]}).encode()
                status, headers, answer = service.next.popleft() if service.next else good
                if status == 0:
                    self.connection.close()
                    return
                self.send_response(status)
                for header, value in headers.items():
                    self.send_header(header, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1alpha1/comments:analyze"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Service()
    made.thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


def scorer(service: Service, **options: Any) -> PerspectiveScorer:
    return PerspectiveScorer(
        **{"endpoint": service.url, "requests_per_second": 1000.0, "backoff": 0.01, "max_attempts": 3, **options}
    )


def error(status: int, message: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps({"error": {"code": status, "message": message}}).encode()


def test_what_is_sent_and_what_comes_back(service: Service) -> None:
    found = scorer(service, attribute="INSULT", language="de")(["four", "", "eight wo", " \n", "four"])
    assert found.tolist() == [0.04, 0.0, 0.08, 0.0, 0.04]
    assert [body["comment"]["text"] for body in service.bodies] == [
        "four",
        "eight wo",
    ]  # each once, none without words
    assert service.bodies[0] == {
        "comment": {"text": "four"}, "languages": ["de"], "requestedAttributes": {"INSULT": {}}, "doNotStore": True,
    }  # fmt: skip
    assert service.keys == [KEY] * 2 and KEY not in "".join(service.paths)
    assert scorer(service)([]).shape == (0,)


def test_what_is_for_this_machine_goes_through_no_proxy(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert scorer(service, max_attempts=1)(["fine"]).shape == (1,)


def test_long_texts_are_cut_at_a_character(service: Service) -> None:
    service.next.append((200, {}, b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 1}}}}'))
    assert scorer(service)(["é" * MOST_BYTES]).tolist() == [1.0]
    assert service.bodies[0]["comment"]["text"] == "é" * (MOST_BYTES // 2)


def test_no_more_requests_a_second_than_allowed(service: Service) -> None:
    begin = time.monotonic()
    scorer(service, requests_per_second=20.0)(["a", "b", "c", "d"])
    assert service.times[-1] - begin >= 3 / 20


def test_what_may_pass_is_tried_again(service: Service) -> None:
    service.next += [error(429, "quota", **{"Retry-After": "0"}), (0, {}, b"")]
    assert scorer(service)(["four"]).tolist() == [0.04]
    assert len(service.bodies) == 3
    service.next += [error(503)] * 3
    with pytest.raises(PerspectiveRefused, match="did not answer in 3 attempts: 503"):
        scorer(service)(["four"])
    assert len(service.bodies) == 6


def test_a_wait_that_the_service_asks_for(service: Service) -> None:
    service.next.append(error(429, "quota", **{"Retry-After": "1"}))
    scorer(service)(["four"])
    assert service.times[1] - service.times[0] >= 1


@pytest.mark.parametrize("status", [404, 410, 501])
def test_a_service_that_is_gone(service: Service, status: int) -> None:
    service.next.append(error(status, "Gone."))
    with pytest.raises(PerspectiveGone, match=rf"Perspective is gone: .* answered {status} Gone\.") as told:
        scorer(service)(["four"])
    assert "2026-12-31" in str(told.value) and "'profanity'" in str(told.value) and len(service.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (error(403, f"API key {KEY} is not valid"), r"refused with 403 API key \(key\) is not valid"),
        (error(400, "LANGUAGE_NOT_SUPPORTED"), "refused with 400 LANGUAGE_NOT_SUPPORTED"),
        ((200, {}, b"<html>"), "without a score of TOXICITY"),
        ((200, {}, b'{"attributeScores": {}}'), "without a score of TOXICITY"),
        ((200, {}, b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": 3}}}}'), "without a score"),
        ((302, {"Location": "http://127.0.0.1:1/elsewhere"}, b""), "refused with 302"),
    ],
)
def test_other_failures_are_told_without_the_key(service: Service, answer: Any, told: str) -> None:
    service.next.append(answer)
    one = scorer(service)
    with pytest.raises(PerspectiveRefused, match=told) as found:
        one(["four"])
    chain = [found.value, found.value.__context__, found.value.__cause__]
    assert not any(KEY in str(each) for each in chain) and KEY not in repr(one)
    assert len(service.bodies) == 1


def test_nobody_there(service: Service) -> None:
    with pytest.raises(PerspectiveRefused, match="did not answer in 2 attempts: .*refused"):
        scorer(service, endpoint="http://127.0.0.1:9/x", max_attempts=2)(["four"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"endpoint": "http://example.org/x"}, "endpoint='http://example.org/x'"),
        ({"requests_per_second": 0.0}, "requests_per_second=0.0"),
        ({"key_env": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY. Received: none"),
    ],
)
def test_what_is_refused(service: Service, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        scorer(service, **options)
    with pytest.raises(TypeError, match="one text"):
        scorer(service)("four")


def test_a_key_of_two_words_is_not_shown(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", f"{KEY} more")
    with pytest.raises(ValueError, match="Received: another") as told:
        scorer(service)
    assert KEY not in str(told.value)
