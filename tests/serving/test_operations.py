"""What those who run a server see: readiness, numbers, ids, a line a request."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sae_transformers import ServeLimits
from sae_transformers.serving import intake
from sae_transformers.serving.tokenizing import Tokenizing
from tests.serving.running import STEERINGS, Running, running, served_model, served_tokenizer, settles

KEY = "sk-of-the-server-0123456789"
MODEL, TOKENIZER = served_model(context=4096), served_tokenizer()
WORDS = re.compile(r"w\d")


@pytest.fixture
def server() -> Iterator[Running]:
    with running(MODEL, TOKENIZER, KEY, limits=ServeLimits(blocked_after_s=0.2)) as made:
        yield made


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the log says of requests."""
    logger, found = logging.getLogger("sae_transformers.serving.web.record"), []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    level, logger.level = logger.level, logging.INFO
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def numbers(server: Running) -> dict[str, float]:
    """Metrics by name and labels."""
    text = server.request("GET", "/metrics").text
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("sae_transformers_"): float(value) for name, value in rows}


def test_requests_tokens_and_errors_are_counted(server: Running) -> None:
    steering = {"extra_body": {"steering": STEERINGS[1].to_dict()}}
    server.chat("w1 w2 w3", n=2, **steering)
    assert len(list(server.chat("w1 w2 w3", stream=True, max_tokens=5))) > 5
    server.post("/detect", {"model": "tiny", "input": ["w1 w2", "w1 w2 w3"], "feature": 9})
    assert server.post("/completions", {"model": "tiny", "prompt": 3}).status == 400
    assert server.post("/completions", {"model": "other", "prompt": "w1"}).status == 404
    assert server.request("GET", "/nowhere/w1").status == 404
    assert server.request("GET", "/health", headers={"Host": "other.test"}).status == 403
    assert server.request("GET", "/v1/models", headers={"Authorization": "Bearer no"}).status == 401
    assert settles(lambda: server.app.state.traffic.at_work == 0)
    found = numbers(server)
    assert found['requests_total{endpoint="/v1/chat/completions",status="200"}'] == 2
    assert found['request_seconds_count{endpoint="/v1/chat/completions"}'] == 2
    assert found['requests_total{endpoint="/v1/detect",status="200"}'] == 1
    assert found['requests_total{endpoint="/v1/completions",status="400"}'] == 1
    assert found['requests_total{endpoint="other",status="404"}'] == 1
    assert found['requests_total{endpoint="other",status="401"}'] == 1
    assert found["prompt_tokens_total"] == 3 + 3 + 5
    assert found["written_tokens_total"] == 2 * 8 + 5
    codes = ("bad_request", "model_not_found", "host_not_allowed", "invalid_api_key")
    assert [found[f'errors_total{{code="{code}"}}'] for code in codes] == [2, 1, 1, 1]
    assert (found["queue_length"], found["batch_rows"], found["batch_cache_bytes"]) == (0, 0, 0)
    assert found["steering_plans"] == MODEL.plans_kept >= 1
    assert found["forward_passes"] == server.engine.steps and found["ready"] == 1 and found["connections"] >= 1


def test_the_state_of_the_batch_is_seen_while_it_is_written(server: Running) -> None:
    stream = server.chat("w1 w2 w3", stream=True, max_tokens=4000, n=2)
    next(iter(stream))
    assert settles(lambda: len(server.engine.batch) == 2)
    found = numbers(server)
    assert found["batch_rows"] == 2 and found["batch_steerings"] == 1 and found["batch_cache_bytes"] > 0
    stream.close()
    assert server.idle() and settles(lambda: numbers(server)["batch_rows"] == 0)


def test_numbers_are_not_told_without_the_key_and_readiness_is(server: Running) -> None:
    nobody = {"Authorization": ""}
    assert server.request("GET", "/metrics", headers=nobody).status == 401
    for path in ("/ready", "/health"):
        assert server.request("GET", path, headers=nobody).status == 200


def test_ids_are_the_clients_where_they_are_sane(server: Running, lines: list[str]) -> None:
    for given, kept in (("trace-7.a:B_", True), ("x" * 128, True), ("x" * 129, False), ("two words", False)):
        connection_answer = server.openai.with_options(default_headers={"X-Request-ID": given}).models.list()
        assert (connection_answer._request_id == given) == kept
    made = {server.chat("w1")._request_id for _ in range(3)}
    assert len(made) == 3 and all(re.fullmatch("[0-9a-f]{24}", one) for one in made)
    assert settles(lambda: len(lines) == 7) and all(any(f"request={one} " in line for line in lines) for one in made)


def test_a_request_is_one_line_without_its_texts(server: Running, lines: list[str]) -> None:
    server.chat("w1 w2 w3", n=2, max_tokens=4)
    server.request("GET", "/w4?w5=w6")
    server.request("GET", "/v1/models/w7")
    server.post("/completions", {"model": "tiny", "prompt": "w1", "w8": 1})
    assert settles(lambda: len(lines) == 4)
    shape = r"request=\w+ client=127.0.0.1 {} status={} prompt_tokens={} written_tokens={} seconds=\d+\.\d+ error={}"
    for line, parts in zip(
        lines,
        [
            ("POST /v1/chat/completions", 200, 3, 8, "-"),
            ("GET other", 404, 0, 0, "bad_request"),
            (r"GET /v1/models/\{asked:path\}", 404, 0, 0, "model_not_found"),
            ("POST /v1/completions", 400, 0, 0, "unknown_parameter"),
        ],
        strict=True,
    ):
        assert re.fullmatch(shape.format(*parts), line), line
    assert not WORDS.search(" ".join(lines)) and KEY not in " ".join(lines)


def test_a_fault_of_the_server_is_told_without_its_words(
    server: Running, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a detail of the machine")

    monkeypatch.setattr("sae_transformers.serving.app.read_detection", broken)
    answer = server.request("POST", "/v1/detect", {}, {"X-Request-ID": "trace-1"})
    assert answer.status == 500 and answer.error["code"] == "failed" and "detail" not in answer.text
    assert settles(lambda: len(lines) == 2) and "on request trace-1" in lines[0]
    assert "request=trace-1" in lines[1] and "status=500" in lines[1]
    assert numbers(server)['errors_total{code="failed"}'] == 1


def test_ready_says_no_while_a_pass_is_stuck(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.get("/ready") == {"status": "ready"}
    goes_on, step = threading.Event(), server.engine.batch.step

    def stuck(tokens: Any) -> Any:
        goes_on.wait(30)
        return step(tokens)

    monkeypatch.setattr(server.engine.batch, "step", stuck)
    stream = server.chat("w1", stream=True, max_tokens=20)
    try:
        assert settles(lambda: server.request("GET", "/ready").status == 503, within_s=10)
        assert server.get("/ready") == {"status": "blocked"} and server.get("/health")["status"] == "ok"
        assert numbers(server)["ready"] == 0
    finally:
        goes_on.set()
    assert len(list(stream)) > 20 and server.request("GET", "/ready").status == 200


def test_ready_says_no_while_a_text_is_stuck_and_short_ones_go_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts take turns, so that one that takes its time holds up the next long one and no short one."""
    goes_on, at_work = threading.Event(), []
    monkeypatch.setattr(intake, "LONG_BODY_BYTES", 2000)
    ids = Tokenizing.ids

    def slow(self: Tokenizing, text: str, **options: bool) -> list[int]:
        if len(text) > 1000:
            at_work.append(text)
            goes_on.wait(30)
        return ids(self, text, **options)

    monkeypatch.setattr(Tokenizing, "ids", slow)
    answers: list[Any] = []
    body = {"model": "tiny", "prompt": "w1 " * 700, "max_tokens": 2}
    threads = [threading.Thread(target=lambda: answers.append(server.post("/completions", body))) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert settles(lambda: len(at_work) == 1, within_s=10)
        assert server.chat("w1 w2").choices[0].message.content
        assert settles(lambda: server.get("/ready") == {"status": "blocked"}, within_s=10)
        assert len(at_work) == 1
    finally:
        goes_on.set()
        for thread in threads:
            thread.join()
    assert [answer.status for answer in answers] == [200] * 3
    assert settles(lambda: server.get("/ready") == {"status": "ready"}, within_s=10)


def test_the_bytes_of_bodies_are_bounded_together(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_HELD_BYTES", 4000)
    body = {"model": "tiny", "prompt": "w1 " * 1000, "max_tokens": 2}
    assert server.post("/completions", {**body, "prompt": "w1 " * 1500}).error["code"] == "busy"
    for _ in range(3):  # what was held is given back
        assert server.post("/completions", body).status == 200


def test_detections_that_wait_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_DETECTIONS", 0)
    answer = server.post("/detect", {"model": "tiny", "input": "w1 w2", "feature": 9})
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
