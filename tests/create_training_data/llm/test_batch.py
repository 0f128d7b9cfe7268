"""Requests as files of the Batch API, and their results in the cache."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_transformers.create_training_data.llm.batch import read_batch_results, submit_batch, write_batch_file
from sae_transformers.create_training_data.llm.client import LLMClient, ServiceRefused
from tests.create_training_data.fake_openai import FakeOpenAI
from tests.create_training_data.llm.test_client import client, requests


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-batch-0123456789")
    with FakeOpenAI() as fake:
        yield fake


def test_a_batch_comes_back_into_the_cache(server: FakeOpenAI, tmp_path: Path) -> None:
    what = requests(7)
    with client(server, cache=tmp_path / "c") as made:
        made.complete_many(what[:2], progress=False)
        files = write_batch_file(made, [*what, *what], tmp_path / "batch.jsonl")
        lines = [json.loads(line) for line in files[0].read_text().splitlines()]
        assert len(lines) == 5
        assert {line["url"] for line in lines} == {"/v1/chat/completions"}
        assert [line["body"]["messages"][0]["content"] for line in lines] == [f"number {i}" for i in range(2, 7)]
        name = submit_batch(made, files[0])
        assert read_batch_results(made, name) == ("completed", 5, [])
        assert all(answer.ok for answer in made.complete_many(what, progress=False))
        assert len(server.sent) == 2
        assert write_batch_file(made, what, tmp_path / "none.jsonl") == []


def test_batch_results_are_read_from_a_file_with_failures_in_it(server: FakeOpenAI, tmp_path: Path) -> None:
    good = {"custom_id": "k", "response": {"status_code": 200, "body": server.completion(requests(1)[0].body("m"))}}
    bad = {"custom_id": "l", "response": {"status_code": 400, "body": {"error": {"message": "too long"}}}}
    expired = {"custom_id": "n", "response": None, "error": {"code": "batch_expired", "message": "too late"}}
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join([*map(json.dumps, (good, bad, expired)), '{"half']))
    with client(server) as made:
        status, answers, failures = read_batch_results(made, file)
        assert (status, answers) == ("completed", 1)
        assert failures[:2] == ["too long", "too late"]
        assert "half" in failures[2]
        assert "k" in made.cache


def test_a_batch_is_cut_into_files_and_kept_within_the_budget(server: FakeOpenAI, tmp_path: Path) -> None:
    with client(server, max_tokens_total=300) as made:
        files = write_batch_file(made, requests(4), tmp_path / "b.jsonl", max_requests=3)
        assert [file.name for file in files] == ["b.jsonl", "b.2.jsonl"]
        with pytest.raises(ValueError, match="max_tokens_total=300"):
            write_batch_file(made, requests(20), tmp_path / "b.jsonl")


def test_a_batch_that_cannot_be_sent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-batch-0123456789")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with (
        LLMClient("m", "http://127.0.0.1:9/v1") as made,
        pytest.raises(ServiceRefused, match="ConnectError") as caught,
    ):
        submit_batch(made, tmp_path / "b.jsonl")
    assert caught.value.__context__ is None
