"""How a language model is asked: the estimate first, files and results of batches, what was used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sae_transformers.create_training_data.llm.requests import Answer, Chat, ChatRequest
from sae_transformers.workflows.reading.asking import Exchange, ask_model
from sae_transformers.workflows.settings.llm import LLMSettings, SendSettings
from tests.create_training_data.fake_openai import FakeOpenAI

REQUESTS = [ChatRequest([{"role": "user", "content": f"Number {number}?"}], max_tokens=4) for number in range(3)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-the-tests")
    with FakeOpenAI() as running:
        yield running


def requests(client: Chat) -> Sequence[ChatRequest]:
    return REQUESTS


def run(client: Chat) -> list[Answer]:
    return client.complete_many(REQUESTS, progress=False)


def ask(server: FakeOpenAI, cache: Path, send: SendSettings) -> tuple[Exchange, list[Answer] | None, list[str]]:
    lines: list[str] = []
    llm = LLMSettings(llm="m", llm_url=server.url, price_in=1, price_out=2)
    exchange, answers = ask_model(llm, send, requests, run, default_cache=cache, notice=lines.append)
    return exchange, answers, lines


def test_the_estimate_comes_first_and_what_was_used_after(server: FakeOpenAI, tmp_path: Path) -> None:
    exchange, answers, lines = ask(server, tmp_path, SendSettings(dry_run=True))
    assert (exchange.account, answers, server.sent, exchange.used()) == (None, None, [], [])
    assert lines == exchange.before() and lines[0].startswith("m: 3 requests to send (0 already answered)")
    exchange, answers, again = ask(server, tmp_path, SendSettings())
    assert answers is not None and all(answer.ok for answer in answers) and again == lines
    assert exchange.used()[0].startswith("3 requests, ") and ", cost 0.00" in exchange.used()[0]


def test_a_batch_is_written_submitted_and_read(server: FakeOpenAI, tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    exchange, answers, lines = ask(server, tmp_path / "c", SendSettings(batch_file=file))
    assert answers is None and exchange.files == {file: None} and lines[-1] == str(file)
    *_, lines = ask(server, tmp_path / "c", SendSettings(batch_file=file, submit=True))
    assert lines[-1] == f"{file}: batch batch_0"
    exchange, answers, lines = ask(server, tmp_path / "c", SendSettings(batch_results=("batch_0",)))
    assert lines[0] == "Batch batch_0: completed, 3 answers, 0 failures" and exchange.estimate.requests == 0
    assert answers is not None and not server.sent


def test_progress_counts_answers_that_are_there(server: FakeOpenAI, tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    with LLMSettings(llm="m", llm_url=server.url).client(tmp_path) as client:
        client.complete_many(REQUESTS[:1], progress=False)
        client.complete_many(REQUESTS, progress=lambda done, total: reported.append((done, total)))
    assert reported == [(2, 3), (3, 3)]


def test_what_cannot_be_is_refused(server: FakeOpenAI, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`submit` needs `batch_file`"):
        SendSettings(submit=True)
    with pytest.raises(ValueError, match="Which model"):
        ask_model(LLMSettings(), SendSettings(), requests, run)
    for send in (SendSettings(batch_file=tmp_path / "b"), SendSettings(batch_results=("b",))):
        with pytest.raises(ValueError, match=r"no server and no batches. Received also: `batch_"):
            ask_model(LLMSettings(local_model="x", cache=tmp_path), send, requests, run)
