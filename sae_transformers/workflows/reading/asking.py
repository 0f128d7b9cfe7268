"""Ask a language model: with an estimate first, one by one or as batches, at a server or in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...create_training_data.llm.batch import BatchResults, read_batch_results, submit_batch, write_batch_file
from ...create_training_data.llm.client import LLMClient
from ...create_training_data.llm.local import LocalChat
from ...create_training_data.llm.requests import Chat, ChatRequest
from ...create_training_data.llm.usage import Account, Estimate
from ..settings.llm import LLMSettings, SendSettings

Answered = TypeVar("Answered")


@dataclass(frozen=True)
class Exchange:
    """What was asked of a language model, and what it took.

    Args:
        model: its name.
        estimate: of the requests, before any of them was sent.
        account: what was used; None where nothing was asked, with `dry_run` or `batch_file`.
        read: batch -> its results, of those that were read first.
        files: file of the Batch API -> id of its batch, None where it was not submitted.
    """

    model: str
    estimate: Estimate
    account: Account | None = None
    read: dict[str, BatchResults] = field(default_factory=dict)
    files: dict[Path, str | None] = field(default_factory=dict)

    def before(self) -> list[str]:
        """Lines on what was known before a request was sent: results of batches, the estimate, files."""
        lines = [
            f"Batch {name}: {found.status}, {found.answers:,} answers, {len(found.failures):,} failures"
            for name, found in self.read.items()
        ]
        lines.append(f"{self.model}: {self.estimate}")
        return lines + [f"{file}: batch {batch}" if batch else f"{file}" for file, batch in self.files.items()]

    def used(self) -> list[str]:
        """A line on what was used; none where nothing was asked."""
        account = self.account
        if account is None:
            return []
        cost = "" if account.cost is None else f", cost {account.cost:,.4f}"
        presumed = f" and up to {account.presumed_tokens:,} that were not reported" if account.presumed_tokens else ""
        tokens = account.prompt_tokens + account.completion_tokens
        return [f"{account.requests:,} requests, {tokens:,} tokens{presumed}{cost}"]


class AskedResult:
    """What came of asking a language model."""

    exchange: Exchange

    @property
    def asked(self) -> bool:
        """Whether the model was asked at all."""
        return self.exchange.account is not None

    def used(self) -> dict[str, Any]:
        """As JSON: the model, what its answers were expected to take and what they took."""
        account = self.exchange.account
        known = {"model": self.exchange.model, "estimate": self.exchange.estimate._asdict()}
        return {**known, "account": None if account is None else account._asdict()}


def ask_model(
    llm: LLMSettings | Chat,
    send: SendSettings,
    requests: Callable[[Chat], Sequence[ChatRequest]],
    run: Callable[[Chat], Answered],
    *,
    default_cache: str | Path | None = None,
    notice: Callable[[str], object] | None = None,
) -> tuple[Exchange, Answered | None]:
    """Estimate what requests cost, then do what is wanted of them: ask, write files for a batch, or nothing.

    Args:
        llm: which model; or a client of one, which stays open.
        send: how requests get there.
        requests: what `run` will send, as far as it is known; it gets the client, whose cache may have answers.
        run: asks with the client and gives what comes of the answers.
        default_cache: folder of the answers, if `llm` does not say.
        notice: called with each line of `Exchange.before`, before anything is sent.

    Returns:
        what was asked; what `run` gave, None where it did not run.

    Raises:
        ValueError: no model is named, a local one has batches, or the budget is too small for a batch.
        ServiceRefused: the server takes no more requests, or the budget is used up; what was answered is kept.
    """
    client = llm if isinstance(llm, Chat) else llm.client(default_cache)
    batches = client if isinstance(client, LLMClient) else None
    if batches is None and (send.batch_file is not None or send.batch_results):
        name = "batch_file" if send.batch_file is not None else "batch_results"
        local = "`local_model` has" if isinstance(client, LocalChat) else f"{client!r} has"
        raise ValueError(f"{local} no server and no batches. Received also: `{name}`.")
    with nullcontext(client) if client is llm else client:
        read = {name: read_batch_results(batches, name) for name in send.batch_results or ()} if batches else {}
        asked = requests(client)
        exchange = Exchange(client.model, client.estimate(asked), None, read)
        if batches and send.batch_file is not None and not send.dry_run:
            files = write_batch_file(batches, asked, send.batch_file)
            sent = {file: submit_batch(batches, file) if send.submit else None for file in files}
            exchange = Exchange(client.model, exchange.estimate, None, read, sent)
        if notice is not None:
            for line in exchange.before():
                notice(line)
        if send.dry_run or send.batch_file is not None:
            return exchange, None
        result = run(client)
        return Exchange(client.model, exchange.estimate, client.account, read), result
