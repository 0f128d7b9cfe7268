"""The client: order, retries that end, nothing paid twice, a budget that holds, a key that stays where it is."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.create_training_data.llm.batch import write_batch_file
from sae_transformers.create_training_data.llm.client import LLMClient, ServiceRefused, is_openai
from sae_transformers.create_training_data.llm.protocol import retry_after_s
from sae_transformers.create_training_data.llm.requests import Answer, AnswerCache, ChatRequest
from tests.create_training_data.fake_openai import FakeOpenAI, key_of, last_user_text

KEY = "sk-never-to-be-seen-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


def requests(count: int, **settings: Any) -> list[ChatRequest]:
    return [ChatRequest([{"role": "user", "content": f"number {i}"}], max_tokens=20, **settings) for i in range(count)]


def client(server: FakeOpenAI, **settings: Any) -> LLMClient:
    given = {"backoff": (0.01, 0.05), "timeout": 10, "api_key_env": "OPENAI_API_KEY", **settings}
    return LLMClient("m", server.url, **given)


def ask(server: FakeOpenAI, what: list[ChatRequest], **settings: Any) -> list[Answer]:
    with client(server, **settings) as made:
        return made.complete_many(what, progress=False)


def test_answers_keep_the_order_of_the_requests(server: FakeOpenAI) -> None:
    what = requests(30)
    answers = ask(server, what)
    assert [f"number {i} " in (answer.text or "") for i, answer in enumerate(answers)] == [True] * 30
    assert len(server.sent) == 30
    assert server.most_running <= 8
    assert server.sent[0].keys() == {"model", "messages", "max_tokens", "temperature", "seed"}
    assert set(server.authorization) == {f"Bearer {KEY}"}


def test_equal_requests_are_sent_once(server: FakeOpenAI) -> None:
    server.delay_s = 0.05
    what = requests(3) * 4
    with client(server) as made:
        threads = [threading.Thread(target=made.complete_many, args=(what, False)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = made.complete_many(what, progress=False)
    assert len(server.sent) == 3
    assert answers[:3] == answers[9:]


@pytest.mark.parametrize("kind", ["429", "500", "503", "half", "cut", "html", "no choices", "blank"])
def test_a_passing_failure_is_tried_again(server: FakeOpenAI, kind: str) -> None:
    server.next(kind, kind)
    answers = ask(server, requests(2), concurrency=1)
    assert all(answer.ok for answer in answers)
    assert len(server.sent) == 4


@pytest.mark.slow
def test_a_timeout_is_tried_again_and_counts_as_if_it_had_been_answered(server: FakeOpenAI) -> None:
    server.next("timeout")
    with client(server, timeout=1.5) as made:
        assert made.complete_many(requests(1), progress=False)[0].ok
        assert made.account.presumed_tokens > 20
        assert made.account.requests == 2


def test_retry_after_is_kept_by_all_threads(server: FakeOpenAI) -> None:
    server.next("429")
    server.retry_after = "0.5"
    ask(server, requests(2), concurrency=1)
    assert server.times[1] - server.times[0] >= 0.5


def test_a_wait_that_is_too_long_stops_the_run(server: FakeOpenAI) -> None:
    server.always, server.retry_after = "429", "3600"
    answers = ask(server, requests(5), concurrency=1)
    assert {answer.failure for answer in answers} == {"not done"}
    assert "asks to wait 3,600 s" in answers[-1].detail
    assert len(server.sent) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "-2"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_has_many_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


def test_a_request_is_given_up_and_asked_again_by_the_next_run(server: FakeOpenAI, tmp_path: Path) -> None:
    server.always = "500"
    answers = ask(server, requests(2), cache=tmp_path, max_attempts=3)
    assert [answer.failure for answer in answers] == ["gave up", "gave up"]
    assert "after 3 attempts" in answers[0].detail
    assert "500: it broke" in answers[0].detail
    assert len(server.sent) == 6
    server.always = None
    assert all(answer.ok for answer in ask(server, requests(2), cache=tmp_path))


def test_a_server_that_is_gone_is_not_asked_forever() -> None:
    with LLMClient(
        "m", "http://127.0.0.1:9", max_attempts=2, backoff=(0.001, 0.001), concurrency=2, stop_after_failures=4
    ) as made:
        answers = made.complete_many(requests(50), progress=False)
        assert made.account.presumed_tokens == 0  # no connection, no cost
    failures = Counter(answer.failure for answer in answers)
    assert failures["gave up"] <= 6
    assert failures["not done"] >= 44
    assert "failures in a row" in answers[-1].detail


@pytest.mark.parametrize(("kind", "failure"), [("refusal", "refusal"), ("filter", "refusal"), ("length", "empty")])
def test_what_the_model_said_itself_is_kept(server: FakeOpenAI, tmp_path: Path, kind: str, failure: str) -> None:
    server.next(kind)
    first = ask(server, requests(1), cache=tmp_path)
    assert first[0].failure == failure
    assert ask(server, requests(1), cache=tmp_path) == first
    assert len(server.sent) == 1


def test_a_wrong_request_is_not_tried_again(server: FakeOpenAI) -> None:
    server.next("400")
    answers = ask(server, requests(2), concurrency=1)
    assert answers[0].failure == "rejected"
    assert "too long" in answers[0].detail
    assert answers[1].ok
    assert len(server.sent) == 2


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("401", "OPENAI_API_KEY"), ("403", "may not use"), ("404", "model='m'"), ("quota", "no money")],
)
def test_a_refusing_server_is_left_at_once(server: FakeOpenAI, tmp_path: Path, kind: str, advice: str) -> None:
    what = requests(40)
    server.next("ok", "ok", "ok", kind)
    server.delay_s = 0.02
    with pytest.raises(ServiceRefused, match=advice) as caught:
        ask(server, what, cache=tmp_path, concurrency=2)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert len(server.sent) < 10
    assert server.idle()
    assert len(AnswerCache(tmp_path)) == len(server.answered)  # what was paid for is kept
    ask(server, what, cache=tmp_path)
    assert max(Counter(map(key_of, server.answered)).values()) == 1


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("response_format", "Unknown parameter: response_format"),
        ("response_format", "bad request"),
        ("max_tokens", "Use 'max_completion_tokens' instead of 'max_tokens'"),
        ("temperature", "temperature is not supported with this model"),
    ],
)
def test_a_field_that_a_server_rejects_is_left_out_from_then_on(server: FakeOpenAI, field: str, message: str) -> None:
    server.rejects = {field: message}
    answers = ask(server, requests(4, response_format={"type": "json_object"}), concurrency=1)
    assert all(answer.ok for answer in answers)
    assert [field in body for body in server.sent] == [True, False, False, False, False]
    if field == "max_tokens":
        assert server.sent[-1]["max_completion_tokens"] == 20


def test_a_request_that_is_wrong_for_another_reason_does_not_cost_the_field(server: FakeOpenAI) -> None:
    server.next("400", "400")
    answers = ask(server, requests(2, response_format={"type": "json_object"}), concurrency=1)
    assert [answer.failure for answer in answers] == ["rejected", None]
    assert "response_format" in server.sent[-1]


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
from tests.create_training_data.llm.test_client import requests
from sae_transformers.create_training_data.llm.client import LLMClient
LLMClient("m", sys.argv[1], cache=sys.argv[2], concurrency=4).complete_many(requests(60), progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_without_paying_twice(server: FakeOpenAI, tmp_path: Path, how: signal.Signals) -> None:
    server.delay_s = 0.1
    server.hold(after=20)
    process = subprocess.Popen([sys.executable, "-c", RUN, server.url, str(tmp_path)], stderr=subprocess.DEVNULL)
    while len(server.answered) < 20:  # however long its start takes
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, how)
    server.go_on()
    process.wait()
    assert server.idle()
    sent_before, cached = len(server.sent), AnswerCache(tmp_path)
    assert 16 <= len(cached) < 60
    if how == signal.SIGINT:  # what is under way is waited for
        assert len(cached) == len(server.answered) == len(server.sent)
    answers = ask(server, requests(60), cache=tmp_path)
    assert all(answer.ok for answer in answers)
    with client(server) as made:
        keys = {key_of(request.body("m")): made.key(request) for request in requests(60)}
    assert not [body for body in server.sent[sent_before:] if keys[key_of(body)] in cached]
    assert len(server.sent) <= 60 + 4  # what was under way when it was killed
    sends = len(server.sent)
    assert ask(server, requests(60), cache=tmp_path) == answers
    assert len(server.sent) == sends


def test_half_a_last_line_loses_only_itself(server: FakeOpenAI, tmp_path: Path) -> None:
    ask(server, requests(3), cache=tmp_path)
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    for cut in (1, 10, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        sends = len(server.sent)
        assert all(answer.ok for answer in ask(server, requests(5), cache=tmp_path))
        assert len(server.sent) - sends == 3 - (cut == 1)  # a line that lacks only its end can be read
        assert len(AnswerCache(tmp_path)) == 5


def test_another_model_server_or_parameter_is_another_request(server: FakeOpenAI) -> None:
    one = requests(1)[0]
    keys = {one.key("m", "http://a"), one.key("n", "http://a"), one.key("m", "http://b")}
    keys |= {requests(1, seed=7)[0].key("m", "http://a"), requests(1, extra={"x": 1})[0].key("m", "http://a")}
    assert len(keys) == 5
    with LLMClient("m", "https://me:secret-word@host/v1/") as made:
        assert made.endpoint == "https://host/v1"


@pytest.mark.parametrize("tokens", [0, 30, 200, 400])
def test_the_token_budget_holds_when_every_request_costs_the_most_it_can(server: FakeOpenAI, tokens: int) -> None:
    server.worst_usage, server.delay_s = True, 0.01
    with client(server, max_tokens_total=tokens, concurrency=8) as made:
        answers = made.complete_many(requests(30), progress=False)
        account = made.account
    assert server.tokens == account.prompt_tokens + account.completion_tokens <= tokens
    done = [answer.ok for answer in answers]
    assert server.idle()
    assert done.count(True) == len(server.answered)
    assert {answer.failure for answer in answers} - {None} == {"not done"}
    assert "budget" in next(answer.detail for answer in answers if not answer.ok)
    assert server.tokens >= tokens - 2 * 65  # and it is used


def test_the_money_budget_holds_and_a_richer_run_goes_on(server: FakeOpenAI, tmp_path: Path) -> None:
    server.delay_s = 0.01
    settings: dict[str, Any] = {"prices": (1000.0, 2000.0), "cache": tmp_path}
    with client(server, max_cost=0.5, **settings) as made:
        answers = made.complete_many(requests(30), progress=False)
        assert made.account.cost is not None
        assert 0.3 < made.account.cost <= 0.5
    done = sum(answer.ok for answer in answers)
    assert 0 < done < 30
    with client(server, max_cost=5.0, **settings) as made:
        assert all(answer.ok for answer in made.complete_many(requests(30), progress=False))
    assert len(server.sent) == 30


def test_failures_are_within_the_budget_too(server: FakeOpenAI) -> None:
    server.always = "half"  # may have cost the most
    with client(server, max_tokens_total=300, max_attempts=50) as made:
        answers = made.complete_many(requests(10), progress=False)
        assert made.account.presumed_tokens <= 300
        assert len(server.sent) <= 300 // 50
    assert {answer.failure for answer in answers} == {"not done"}


def test_a_server_without_usage_counts_as_the_worst_case(server: FakeOpenAI) -> None:
    server.without_usage = True
    with client(server, max_tokens_total=300) as made:
        made.complete_many(requests(10), progress=False)
        assert 150 < made.account.presumed_tokens <= 300


def test_the_estimate_is_no_less_than_the_actual_and_sends_nothing(
    server: FakeOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = [ChatRequest([{"role": "user", "content": f"{i} " + "a sentence of words. " * 40}]) for i in range(9)]
    settings: dict[str, Any] = {"prices": (1.0, 2.0), "cache": tmp_path}
    with monkeypatch.context() as context, client(server, **settings) as made:
        context.delenv("OPENAI_API_KEY")
        before = made.estimate([*what, what[0]])
    assert not server.sent
    with client(server, **settings) as made:
        made.complete_many(what, progress=False)
        account = made.account
        after = made.estimate(what)
    assert (before.requests, before.answered, after.requests) == (9, 1, 0)
    assert account.prompt_tokens <= before.prompt_tokens <= 2 * account.prompt_tokens
    assert before.completion_tokens == 9 * 512
    assert account.cost is not None
    assert before.cost is not None
    assert account.cost <= before.cost
    assert "9 requests to send (1 already answered)" in str(before)


def test_a_tokenizer_counts_exactly(server: FakeOpenAI) -> None:
    with client(server, tokenizer=lambda text: 1000) as made:
        assert made.estimate(requests(2)).prompt_tokens == 2 * (1000 + 8 + 16)


def test_the_key_is_in_no_file_log_exception_or_repr(
    server: FakeOpenAI, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = []
    server.answer = lambda body: f"{server.authorization[-1]} says {last_user_text(body)}"  # a server that tells it
    server.next("500", "timeout", "half", "429", "400")
    with caplog.at_level(logging.DEBUG):
        url = server.url.replace("http://", "http://someone:the-password@")
        for where in (server.url, url):
            settings: dict[str, Any] = {"cache": tmp_path / "c", "timeout": 0.5, "backoff": (0.01, 0.02)}
            with LLMClient("m", where, api_key_env="OPENAI_API_KEY", **settings) as made:
                texts += [repr(made), str(made), repr(made.complete_many(requests(8), progress=True))]
                write_batch_file(made, requests(12), tmp_path / "batch.jsonl")
                server.next("401")
                with pytest.raises(ServiceRefused) as caught:
                    made.complete_many(requests(3, seed=len(where)), progress=False)
                texts += [repr(caught.value), str(caught.value), repr(caught.value.__context__)]
    captured = capfd.readouterr()
    texts += [caplog.text, captured.out, captured.err]
    texts += [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(server.authorization) > 10
    basic = [header for header in server.authorization if header.startswith("Basic ")]
    assert basic
    for secret in (KEY, "the-password", basic[0].removeprefix("Basic ")):
        assert not [text for text in texts if secret in text]
    assert any("[secret]" in text for text in texts)


@pytest.mark.parametrize("key", ["sk-é-secret", "sk-a\nsecret", "sk-a secret"])
def test_a_key_that_the_client_would_show_is_refused(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not one word") as caught:
        ask(server, requests(1))
    assert "secret" not in repr(caught.value)


def test_openai_needs_a_key_and_other_servers_may_do_without(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with LLMClient("m") as made, pytest.raises(ValueError, match="OPENAI_API_KEY"):
        made.complete_many(requests(1), progress=False)
    assert ask(server, requests(1))[0].ok


def test_a_key_goes_to_the_server_that_it_was_named_for(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment holds for OpenAI goes to no other server, and nothing of it through a proxy."""
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-openai-alone")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: of-openai-alone\nAuthorization: Bearer of-openai-alone")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("A_KEY", "named-for-this-server")
    for given, sent in ((None, "none"), ("A_KEY", "named-for-this-server"), ("OPENAI_API_KEY", KEY)):
        with LLMClient("m", api_key_env=given, max_attempts=1) as made:
            assert made.complete_many(requests(1), progress=False)[0].ok
        assert server.headers[-1]["authorization"] == f"Bearer {sent}"
        assert "of-openai-alone" not in str(server.headers[-1])


@pytest.mark.parametrize(
    ("url", "expected"),
    [("https://api.openai.com/v1", True), ("https://eu.api.openai.com/v1", True), ("http://api.openai.com/v1", False),
     ("https://api.openai.com.example/v1", False), ("https://notapi.openai.com/v1", False),
     ("https://127.0.0.1/api.openai.com", False)],
)  # fmt: skip
def test_openai_is_known_by_its_host(url: str, expected: bool) -> None:
    assert is_openai(url) is expected


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_a_redirect_is_not_followed(server: FakeOpenAI, status: str) -> None:
    with FakeOpenAI() as elsewhere:
        server.always, server.elsewhere = status, elsewhere.url
        with pytest.raises(ServiceRefused, match=f"{server.url} sends requests elsewhere, and is not followed"):
            ask(server, requests(1))
        assert not elsewhere.headers
        with client(server) as made, pytest.raises(ServiceRefused, match=status):
            made.with_openai(lambda openai: openai.files.list())
        assert not elsewhere.headers


def test_a_server_that_asks_for_a_key_says_how_to_give_one(server: FakeOpenAI) -> None:
    server.next("401")
    with pytest.raises(ServiceRefused, match="name the environment variable .* by `api_key_env`"):
        ask(server, requests(1), api_key_env=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_cost": 1.0}, "needs `prices`"),
        ({"max_tokens_total": -1}, "max_tokens_total=-1"),
        ({"prices": (1.0,)}, "two prices"),
        ({"base_url": "host/v1"}, "https://host"),
        ({"base_url": "https://host/v1?key=hidden"}, "must end with its path"),
        ({"base_url": "http://host/v1"}, "must be https, unless it is of this machine"),
        ({"base_url": "http://me:hidden@192.168.0.7:8000/v1", "api_key_env": "A_KEY"}, "at '192.168.0.7:8000'"),
        ({"base_url": "http://127.0.0.1.example/v1"}, "must be https"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LLMClient("m", **settings)
    assert "hidden" not in str(caught.value)


def test_importing_the_client_does_not_import_openai() -> None:
    code = (
        "import sys, sae_transformers.create_training_data.annotation.steps, sae_transformers.cli;"
        "import sae_transformers.create_training_data.llm.client; print('openai' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
