"""The verbs `explain` and `judge`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    BaseUrl,
    BatchFile,
    BatchResults,
    BatchSize,
    Cache,
    Concurrency,
    DryRun,
    Extra,
    First,
    KeyEnv,
    LLMModel,
    LocalModel,
    MaxAttempts,
    MaxCost,
    MaxTokens,
    MaxTokensTotal,
    Out,
    PriceIn,
    PriceOut,
    Structured,
    Submit,
    Table,
    Timeout,
)

if TYPE_CHECKING:
    from ..create_training_data.annotation_tables import AnnotationRow
    from ..create_training_data.annotation_tasks import Task
    from ..create_training_data.llm_requests import ChatRequest

SERVER_ONLY = ("model", "base_url", "max_tokens_total", "max_cost", "batch_file", "batch_results")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(explain)
    app.command()(judge)


def explain(
    features: Table,
    out: Out,
    model: LLMModel = None,
    base_url: BaseUrl = None,
    local_model: LocalModel = None,
    task: Annotated[str | None, typer.Option(help="Whose rules clean the spans: a task, as judge takes it.")] = None,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Have each summary compared with spans.")] = True,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = 8,
    max_tokens_total: MaxTokensTotal = None,
    max_cost: MaxCost = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_attempts: MaxAttempts = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    max_tokens: MaxTokens = None,
    extra: Extra = "{}",
    structured: Structured = True,
    batch_size: BatchSize = 8,
    first: First = None,
    dry_run: DryRun = False,
    batch_file: BatchFile = None,
    submit: Submit = False,
    batch_results: BatchResults = None,
) -> None:
    """Say what each feature stands for, from its spans, with a language model; and have that verified."""
    settings = dict(locals())

    def steps(rows: list[AnnotationRow], client: Any) -> tuple[Any, Any]:
        from ..create_training_data import annotate
        from ..create_training_data.annotation_tasks import load_task

        asking = _adapted(annotate.explaining(task), max_tokens, extra)
        checking = _adapted(load_task("verify"), max_tokens, extra) if check else None

        def run() -> list[AnnotationRow]:
            found = annotate.explain(rows, client, task, prompts=asking)
            if checking is None:
                return found
            return annotate.verify(found, client, task, prompts=checking, structured=structured)

        cleaned = None if checking is None else annotate.cleaned_by(checking, task)
        return annotate.expected_requests(rows, client, asking, cleaned, structured), run

    _run(settings, ("FeatureID", "Verify", "Summary", "Words"), steps, lambda row: row.verify)


def judge(
    features: Table,
    task: Annotated[str, typer.Option(help="toxicity, helpfulness, disease, or a YAML file.")],
    out: Out,
    model: LLMModel = None,
    base_url: BaseUrl = None,
    local_model: LocalModel = None,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = 8,
    max_tokens_total: MaxTokensTotal = None,
    max_cost: MaxCost = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_attempts: MaxAttempts = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    max_tokens: MaxTokens = None,
    extra: Extra = "{}",
    structured: Structured = True,
    batch_size: BatchSize = 8,
    first: First = None,
    dry_run: DryRun = False,
    batch_file: BatchFile = None,
    submit: Submit = False,
    batch_results: BatchResults = None,
) -> None:
    """Say of each explained feature whether a task intends it. The others are what a classifier should not use."""
    settings = dict(locals())

    def steps(rows: list[AnnotationRow], client: Any) -> tuple[Any, Any]:
        from ..create_training_data import annotate
        from ..create_training_data.annotation_tasks import load_task

        asking = _adapted(load_task(task), max_tokens, extra)
        if not any(row.summary.strip() for row in rows):
            raise ValueError(f"No feature of {features} has a summary; run explain first.")
        requests = annotate.ask(rows, asking, structured).requests
        return requests, lambda: annotate.judge(rows, client, asking, structured=structured)

    from ..create_training_data.annotation_tasks import load_task
    from ..create_training_data.answers import NOT_JUDGED

    try:
        labels = (*load_task(task).labels, NOT_JUDGED)
    except (ValueError, OSError):
        labels = None  # told below
    _run(settings, ("FeatureID", "Task", "Verify", "Summary", "Words"), steps, _first_labels, labels)


def _first_labels(row: AnnotationRow) -> str:
    from ..create_training_data.answers import task_labels

    return ", ".join(task_labels(row.task))


Steps = Callable[[Any, Any], tuple[Sequence["ChatRequest"], Callable[[], list[Any]]]]


def _run(
    settings: dict[str, Any],
    columns: tuple[str, ...],
    steps: Steps,
    label: Callable[[Any], str],
    labels: Sequence[str] | None = None,
) -> None:
    """What both verbs do: estimate, ask, write the table, tell what is missing."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see quickstart
    from rich.console import Console

    from ..create_training_data.annotation_tables import read_annotations, write_annotations
    from ..create_training_data.llm_client import ServiceRefused
    from .errors import fail

    console = Console(soft_wrap=True, highlight=False)
    out: Path = settings["out"]
    base = out.with_suffix("") if out.suffix in (".tsv", ".parquet") else out
    try:
        rows = read_annotations(settings["features"])[: settings["first"]]
        with open_client(settings) as client:
            for source in settings["batch_results"] or ():
                status, answers, failures = client.read_batch_results(source)
                console.print(f"Batch {source}: {status}, {answers:,} answers, {len(failures):,} failures")
            requests, run = steps(rows, client)
            console.print(f"{client.model}: {client.estimate(requests)}", markup=False)
            if settings["dry_run"]:
                return
            if settings["batch_file"] is not None:
                files = client.write_batch_file(requests, settings["batch_file"])
                for file in files:
                    console.print(f"{file}: batch {client.submit_batch(file)}" if settings["submit"] else f"{file}")
                return
            rows = run()
            account = client.account
        files = [write_annotations(rows, f"{base}{ending}", columns) for ending in (".tsv", ".parquet")]
    except ServiceRefused as error:
        fail(f"{error}. What was answered is kept: the same command goes on from there.", code=1)
    except (ValueError, OSError, ImportError, TypeError) as error:
        fail(error, code=2)
    counts = Counter(label(row) for row in rows)
    cost = "" if account.cost is None else f", cost {account.cost:,.4f}"
    presumed = f" and up to {account.presumed_tokens:,} that were not reported" if account.presumed_tokens else ""
    console.print(
        f"{account.requests:,} requests, {account.prompt_tokens + account.completion_tokens:,} tokens{presumed}{cost}"
    )
    console.print(", ".join(f"{name[:40]}: {count:,}" for name, count in counts.most_common(12)), markup=False)
    if strange := sum(
        labels is not None and any(part not in labels for part in label(row).split(", ")) for row in rows
    ):
        console.print(f"{strange:,} answers are no label and count as unintended: does the model keep to the format?")
    console.print(" ".join(str(file) for file in files))
    failures = Counter(row.failure for row in rows if row.failure)
    if failures:
        reason, count = failures.most_common(1)[0]
        fail(
            f"{sum(failures.values()):,} of {len(rows):,} features have no answer, {count:,} of them because: {reason}"
            ". The same command asks for these only.",
            code=1,
        )


def open_client(settings: dict[str, Any]) -> Any:
    """The model that answers; with commands for a server's batches only where there is a server."""
    from ..create_training_data.packages import cache_folder

    cache = settings["cache"] or cache_folder() / "answers"
    prices = (settings["price_in"], settings["price_out"])
    if (prices[0] is None) != (prices[1] is None):
        raise ValueError(f"--price-in and --price-out go together. Received: {prices[0]!r} and {prices[1]!r}.")
    if settings["submit"] and settings["batch_file"] is None:
        raise ValueError("--submit needs --batch-file, the file to send.")
    if settings["local_model"] is not None:
        from ..create_training_data.local_chat import LocalChat

        given = [name for name in SERVER_ONLY if settings[name]]
        if given:
            raise ValueError(f"--local-model has no server and no budget. Received also: {given}.")
        return LocalChat(settings["local_model"], batch_size=settings["batch_size"], cache=cache)
    if settings["model"] is None:
        raise ValueError("Which model? Give --model, its name at the server; or --local-model, to run one here.")
    from ..create_training_data.llm_client import LLMClient

    names = ("base_url", "api_key_env", "concurrency", "max_tokens_total", "max_cost", "timeout", "max_attempts")
    chosen = {name: settings[name] for name in names}
    return LLMClient(settings["model"], **chosen, prices=None if prices[0] is None else prices, cache=cache)


def _adapted(task: Task, max_tokens: int | None, extra: str) -> Task:
    """The task with what the command line says of its requests."""
    from dataclasses import replace

    try:
        fields = json.loads(extra)
    except ValueError as error:
        raise ValueError(f"--extra must be a JSON object. Received: {extra!r} ({error}).") from None
    if not isinstance(fields, dict):
        raise ValueError(f"--extra must be a JSON object. Received: {extra!r}.")
    return replace(task, max_tokens=max_tokens or task.max_tokens, extra={**task.extra, **fields})
