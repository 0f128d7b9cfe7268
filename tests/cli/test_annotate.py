"""The verbs `explain` and `judge`: their options, what they show, and what they refuse."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.tables import (
    read_annotations,
    read_unintended,
    write_annotations,
)
from sae_transformers.create_training_data.llm.local import LocalChat
from tests.create_training_data.annotation.test_steps import KEY, features, local, server  # noqa: F401
from tests.create_training_data.fake_openai import FakeOpenAI

KEY_OF = ("--api-key-env", "OPENAI_API_KEY")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_annotations(features(), tmp_path / "features.tsv", ("FeatureID", "Words"))


def test_explain_and_judge_from_the_command_line(server: FakeOpenAI, table: Path, tmp_path: Path) -> None:
    common = ["--llm", "m", "--llm-url", server.url, "--cache", str(tmp_path / "c"), "--price-in", "1", *KEY_OF]
    common += ["--price-out", "2"]
    explained, judged = tmp_path / "explained", tmp_path / "judged.tsv"
    code, output = run("explain", str(tmp_path), "--out", str(explained), *common, "--dry-run")
    assert (code, len(server.sent)) == (0, 0)
    assert "10 requests to send (0 already answered)" in output
    assert not explained.with_suffix(".tsv").exists()
    code, output = run("explain", str(table), "--out", str(explained), *common)
    assert code == 0, output
    assert "yes: 4" in output
    assert "9 requests" in output
    assert explained.with_suffix(".tsv").read_text().startswith("FeatureID\tVerify\tSummary\tWords\n")
    code, output = run("judge", f"{explained}.parquet", "--task", "toxicity", "--out", str(judged), *common)
    assert code == 0, output
    assert "yes: 2" in output
    assert read_unintended(judged) == [8, 10]
    assert read_unintended(judged.with_suffix(".parquet")) == [8, 10]
    sends = len(server.sent)
    assert run("judge", f"{explained}.tsv", "--task", "toxicity", "--out", str(judged), *common)[0] == 0
    assert len(server.sent) == sends
    everything = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in [*everything, output] if KEY in text]
    assert "no label" not in output
    server.always = "wrong label"
    code, output = run("judge", f"{explained}.tsv", "--task", "helpfulness", "--out", str(judged), *common)
    assert code == 0 and "4 answers are no label and count as unintended" in output


def test_judge_of_spans_that_nobody_explained_says_so(server: FakeOpenAI, table: Path, tmp_path: Path) -> None:
    common = ["--task", "toxicity", "--out", str(tmp_path / "j"), "--llm", "m", "--llm-url", server.url]
    for source in (tmp_path, table):
        code, output = run("judge", str(source), *common, "--cache", str(tmp_path / "c"))
        assert code == 2 and f"No feature of {source} has a summary; run explain first." in output
    assert not server.sent and not (tmp_path / "j.tsv").exists()


def test_a_run_without_enough_money_ends_clearly_and_goes_on(server: FakeOpenAI, table: Path, tmp_path: Path) -> None:
    common = ["explain", str(table), "--out", str(tmp_path / "e"), "--llm", "m", "--llm-url", server.url]
    common += ["--cache", str(tmp_path / "c"), "--no-verify", "--concurrency", "1", *KEY_OF]
    code, output = run(*common, "--max-total-tokens", "3500")
    assert code == 1
    assert "of 6 features have no answer" in output
    assert "not done: the budget is used up" in output
    answered = len(server.answered)
    assert 0 < answered < 5
    code, output = run(*common)
    assert code == 0, output
    assert len(server.sent) == 5


def test_a_server_that_is_not_there_is_named(table: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        url = f"http://127.0.0.1:{one.getsockname()[1]}/v1"
    common = ["explain", str(table), "--out", str(tmp_path / "e"), "--llm", "m", "--cache", str(tmp_path / "c")]
    code, output = run(*common, "--llm-url", url, "--max-attempts", "1", "--max-rows", "2")
    assert code == 1
    assert f"because: gave up: after 1 attempts: no answer from {url}: Connection error. (ConnectError)" in output
    code, output = run(*common, "--llm-url", url, "--batch-file", str(tmp_path / "b.jsonl"), "--submit")
    assert code == 1 and f"no answer from {url}: Connection error. (ConnectError)" in output


def test_batches_from_the_command_line(server: FakeOpenAI, table: Path, tmp_path: Path) -> None:
    common = ["explain", str(table), "--out", str(tmp_path / "e"), "--llm", "m", "--llm-url", server.url]
    common += ["--cache", str(tmp_path / "c"), "--no-verify"]
    code, output = run(*common, "--batch-file", str(tmp_path / "b.jsonl"), "--submit")
    assert code == 0, output
    assert "batch batch_0" in output
    code, output = run(*common, "--batch-results", "batch_0")
    assert code == 0, output
    assert "completed, 5 answers" in output
    assert not server.sent
    assert read_annotations(tmp_path / "e.tsv")[0].summary == "Texts about weapons."


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--llm", "m", "--task", "nothing"], 2, "Received: --task='nothing'"),
        (["--task", "toxicity"], 2, "Which model?"),
        (["--llm", "m", "--task", "toxicity", "--price-in", "1"], 2, "go together"),
        (["--llm", "m", "--task", "toxicity", "--extra", "[1]"], 2, "JSON object"),
        (["--llm", "m", "--task", "toxicity", "--submit"], 2, "--batch-file"),
        (["--llm", "m", "--local-model", "x", "--task", "toxicity"], 2, "Received also: --llm, --llm-url."),
        (["--llm", "m", "--task", "explain"], 2, "has labels"),
        (
            ["--llm", "m", "--task", "toxicity", "--api-key-env", "NOT_SET"],
            1,
            "set the environment variable NOT_SET",
        ),
    ],
)
def test_the_command_line_tells_what_is_wrong(
    server: FakeOpenAI, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    table = write_annotations([replace(row, summary="S.") for row in features()], tmp_path / "f.tsv")
    common = ["judge", str(table), "--out", str(tmp_path / "o"), "--llm-url", server.url, "--cache", str(tmp_path)]
    got, output = run(*common, *arguments)
    assert got == code, output
    assert message in output
    assert not server.answered


def test_a_local_model_from_the_command_line(
    local: tuple[Any, Any], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalChat, "_load", lambda self: local)
    monkeypatch.setattr(local[0].config, "max_position_embeddings", 10_000)
    common = ["--out", str(tmp_path / "e"), "--cache", str(tmp_path / "c"), "--max-answer-tokens", "4"]
    code, output = run("explain", str(table), "--local-model", "tiny", "--max-rows", "2", *common)
    assert code in (0, 1), output
    assert len(read_annotations(tmp_path / "e.tsv")) == 2


def test_old_spellings_are_still_taken(server: FakeOpenAI, table: Path, tmp_path: Path) -> None:
    old = ["--model", "m", "--base-url", server.url, "--max-tokens", "9", "--first", "3", "--plain", *KEY_OF]
    code, output = run("explain", str(table), "--out", str(tmp_path / "e"), "--cache", str(tmp_path / "c"), *old)
    assert code == 0, output
    for note in ("--model is now --llm.", "--first is now --max-rows.", "--plain is now --no-structured."):
        assert note in output
    assert {body["max_tokens"] for body in server.sent} == {9}
    assert not any("response_format" in body for body in server.sent)
    assert len(read_annotations(tmp_path / "e.tsv")) == 3
