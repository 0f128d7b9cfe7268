"""Requests as the JSONL files of OpenAI's Batch API: cheaper, answered within a day.

The answers go into the client's cache, so that `complete_many` on the same requests finds them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .client import LLMClient
from .protocol import message_of, read_completion
from .requests import ChatRequest

ENDPOINT = "/v1/chat/completions"
MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # of a file, at OpenAI


class BatchResults(NamedTuple):
    """status: of the batch, "completed" for a file. answers: put into the cache. failures: their reasons."""

    status: str
    answers: int
    failures: list[str]


def write_batch_file(
    client: LLMClient, requests: Sequence[ChatRequest], path: str | Path, *, max_requests: int = MAX_REQUESTS
) -> list[Path]:
    """Write the requests that have no answer yet, each once.

    Args:
        path: of the file. Where one file would be too long for the server, `name.2.jsonl`, ... follow.
        max_requests: of a file.

    Returns:
        The files, none if all is answered.

    Raises:
        ValueError: the requests may cost more than the client's budget.
    """
    lines = []
    total = client.budget.worst_case(client.missing(requests).values(), client.count)
    if not client.budget.fits(total):
        raise ValueError(
            f"The batch may use {sum(total):,} tokens, more than the budget. Received: "
            f"max_tokens_total={client.budget.max_tokens_total}, max_cost={client.budget.max_cost}."
        )
    parts: list[list[str]] = []
    size = 0
    for key, request in client.missing(requests).items():
        body = client.adapted(request.body(client.model))
        line = json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body}) + "\n"
        if not parts or len(parts[-1]) >= max_requests or size + len(line) > MAX_BYTES:
            parts.append(lines := [])
            size = 0
        lines.append(line)
        size += len(line)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path if not number else path.with_suffix(f".{number + 1}{path.suffix}") for number in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(part), encoding="utf-8")
    return files


def submit_batch(client: LLMClient, path: str | Path) -> str:
    """Upload a file of requests and start it; the id of the batch."""

    def submit(openai: Any) -> str:
        with Path(path).open("rb") as file:
            uploaded = openai.files.create(file=file, purpose="batch")
        return openai.batches.create(input_file_id=uploaded.id, endpoint=ENDPOINT, completion_window="24h").id

    return client.with_openai(submit)


def read_batch_results(client: LLMClient, source: str | Path) -> BatchResults:
    """Put the answers of a batch into the client's cache.

    Args:
        source: the file of results, or the id of a batch, whose results are fetched if it has ended.
    """
    if Path(source).exists():
        return _read_lines(client, "completed", Path(source).read_text(encoding="utf-8"))

    def fetch(openai: Any) -> tuple[str, list[str]]:
        batch = openai.batches.retrieve(str(source))
        names = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        return batch.status, [openai.files.content(name).text for name in names]

    status, texts = client.with_openai(fetch)
    return _read_lines(client, status, *texts)


def _read_lines(client: LLMClient, status: str, *texts: str) -> BatchResults:
    answers, failures = 0, []
    for line in (line for text in texts for line in text.split("\n") if line.strip()):
        try:
            record: dict[str, Any] = json.loads(line)
            key, response = record["custom_id"], record.get("response") or {}
        except (ValueError, KeyError, TypeError, AttributeError):
            failures.append(f"not a line of results: {line[:80]!r}")
            continue
        body = response.get("body")
        if response.get("status_code") != 200:
            failures.append(client.clean(message_of(body or record.get("error"))))
            continue
        answer, _, problem = read_completion(client.clean(json.dumps(body)))
        if answer is None:
            failures.append(problem)
        else:
            client.cache.put(key, answer)
            answers += 1
    return BatchResults(status, answers, failures)
