"""Many clients at once, clients that go away, and the verbs that ask a server."""

from __future__ import annotations

import json
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.create_training_data.annotation.tables import AnnotationRow, read_annotations, write_annotations
from tests.serving.running import STEERINGS, Running, offline, running, served_model, served_tokenizer, settles

MODEL, TOKENIZER = served_model(context=4096), served_tokenizer()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, TOKENIZER) as made:
        yield made


def test_32_at_once_with_different_steering(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what it would be alone, in as many passes as the longest; half of them are streamed."""
    steps, submit, arrived = server.engine.steps, server.engine.submit, []

    def together(answers: list[Any]) -> None:
        arrived.extend(answers)
        if len(arrived) == 32:
            submit(arrived)

    monkeypatch.setattr(server.engine, "submit", together)

    def stronger(edit: dict[str, Any], by: int) -> dict[str, Any]:
        return edit if edit["op"] == "erase" else {**edit, "value": edit["value"] + by}

    variants = [
        {**steering.to_dict(), "edits": [stronger(edit, by) for edit in steering.to_dict()["edits"]]}
        for by in range(7)
        for steering in STEERINGS[1:]
    ][:32]  # fmt: skip

    def ask(number: int) -> str:
        text = " ".join(f"w{number + i}" for i in range(1 + number % 9))
        options: Any = {"max_tokens": 4 + number % 13, "extra_body": {"steering": variants[number]}}
        if number % 2:
            return server.chat(text, **options).choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in server.chat(text, stream=True, **options))

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    for number, text in enumerate(found):
        asked = " ".join(f"w{number + i}" for i in range(1 + number % 9))
        assert text == offline(MODEL, TOKENIZER, asked, variants[number], 4 + number % 13), number
    assert len(set(found)) > 25
    assert server.engine.steps - steps == 4 + 12


def leave(server: Running, fields: dict[str, Any], until: bytes) -> Callable[[], Any]:
    """Ask over a plain socket and close it as soon as `until` has come, or as the writing begins.

    Returns:
        The cache of the answer, or None once it is freed.
    """
    body = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 4000, **fields}
    raw = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        seen = b""
        while until and until not in seen:
            seen += connection.recv(4096)
            assert seen.startswith(b"HTTP/1.1 200"), seen
        while (cache := server.engine.batch.cache) is None:
            time.sleep(0.001)
    return weakref.ref(cache)


@pytest.mark.parametrize(
    ("fields", "until"), [({"stream": True, "n": 3}, b"w"), ({}, b""), ({"stream": True}, b"")],
    ids=["in mid-stream", "waiting for the whole", "before the stream"],
)  # fmt: skip
def test_a_client_that_leaves_frees_what_it_held(server: Running, fields: dict[str, Any], until: bytes) -> None:
    cache = leave(server, fields, until)
    assert server.idle()
    steps = server.engine.steps
    assert steps < 4000
    time.sleep(0.05)
    assert server.engine.steps == steps  # nothing goes on
    assert server.engine.batch.cache is None and not len(server.engine.batch)
    assert settles(lambda: cache() is None)  # what it held is freed, not only forgotten


def test_judge_and_explain_ask_the_server(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model says nothing of use; what is shown is that every answer comes, in the form that is read."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    rows = [AnnotationRow(i, f"Span 1: w{i} w3\nSpan 2: w4 w{i}", "w5 w6") for i in range(3)]
    table = tmp_path / "features.tsv"
    write_annotations(rows, table, ("FeatureID", "Verify", "Summary", "Words"))
    options = ["--model", "tiny", "--base-url", server.url, "--max-tokens", "7", "--cache", str(tmp_path / "cache")]
    steps = server.engine.steps
    judged = CliRunner().invoke(
        app, ["judge", str(table), "--task", "toxicity", "--out", str(tmp_path / "judged"), *options]
    )
    assert judged.exit_code == 0, judged.output
    assert server.engine.steps > steps and re.search(r"[1-9]\d* requests", judged.output)
    assert "answers are no label" in judged.output  # and the run went on
    assert [row.feature_id for row in read_annotations(tmp_path / "judged.tsv")] == [0, 1, 2]
    explained = CliRunner().invoke(
        app, ["explain", str(table), "--out", str(tmp_path / "told"), "--no-verify", *options]
    )
    assert explained.exit_code == 0, explained.output
    assert all(row.summary for row in read_annotations(tmp_path / "told.tsv"))
