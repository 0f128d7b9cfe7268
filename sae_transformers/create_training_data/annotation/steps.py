"""Explain what features stand for, verify the explanations, and judge which features a task intends.

    rows = read_annotations("spans/features.tsv")
    rows = verify(explain(rows, client), client)
    rows = judge(rows, client, "toxicity")
    write_annotations(rows, "toxicity.tsv")
    unintended_features(rows)

SelfReg's three steps (https://huggingface.co/papers/2502.14133). What a run has been told
stays in the client's cache, so a run that was cut off is called again in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..llm.requests import Answer, Chat, ChatRequest
from ..llm.usage import Estimate
from .parsing import CANNOT_TELL, NOT_JUDGED, join_judgements, parse_explanation, read_judgement, without_thoughts
from .tables import AnnotationRow
from .tasks import Task, load_task

UNKNOWN_SUMMARY = "x" * 150  # stands for a summary that is not known yet, where requests are counted


class Asked(NamedTuple):
    """The requests of a step. places: the row of each group of requests, one a judgement."""

    places: list[int]
    requests: list[ChatRequest]
    per_row: int


def ask(rows: Sequence[AnnotationRow], task: Task, structured: bool = True) -> Asked:
    """The requests of a task for the rows that it asks about."""
    places = [number for number, row in enumerate(rows) if task.asks_about(row)]
    requests = [request for number in places for request in task.requests(rows[number], structured)]
    return Asked(places, requests, len(task.judgements))


def explain(
    features: Sequence[AnnotationRow],
    client: Chat,
    task: str | Path | Task | None = None,
    *,
    prompts: str | Path | Task = "explain",
    progress: bool | Callable[[int, int], object] = True,
) -> list[AnnotationRow]:
    """Summaries of features from their spans.

    Args:
        features: with `words`. One without spans gets "Cannot Tell."
        task: whose `remove` cleans the spans; None for none.
        prompts: a task without labels.

    Returns:
        The rows, in order, with `summary`; where there is no answer it is empty and `failure` says why.
    """
    asking = explaining(task, prompts)
    asked = ask(features, asking)
    return _explained(features, asked, client.complete_many(asked.requests, progress))


def verify(
    features: Sequence[AnnotationRow],
    client: Chat,
    task: str | Path | Task | None = None,
    *,
    prompts: str | Path | Task = "verify",
    structured: bool = True,
    progress: bool | Callable[[int, int], object] = True,
) -> list[AnnotationRow]:
    """A second look at each summary: `verify` becomes the label. "Cannot Tell." gives "no"; no spans "-".

    Args:
        features, task: as for `explain`.
        prompts: a task with labels and one judgement.
        structured: ask for JSON. A server that rejects this is asked for text.
    """
    asking = cleaned_by(load_task(prompts), task)
    rows = [replace(row, verify="no" if _untold(row) else NOT_JUDGED) for row in features]
    for number, found, failure in _judged(rows, client, asking, structured, progress):
        label = found[0][0] if found else NOT_JUDGED
        rows[number] = replace(rows[number], verify=label, failure=failure or rows[number].failure)
    return rows


def judge(
    features: Sequence[AnnotationRow],
    client: Chat,
    task: str | Path | Task,
    *,
    structured: bool = True,
    progress: bool | Callable[[int, int], object] = True,
) -> list[AnnotationRow]:
    """Whether a task intends each feature: `task` becomes label|||full answer, for each of its judgements in turn.

    Features without spans or summary are not judged, "-". Nor are those where an answer is missing; then `failure`
    says why.

    Args:
        features: with `words` and `summary`.
        task: a name of `task_names()`, or a YAML file.
        structured: as for `verify`.
    """
    asking = load_task(task)
    if not asking.labels:
        raise ValueError(f"A task to judge by has labels. Received: task={asking.name!r}, which has none.")
    rows = [replace(row, task=NOT_JUDGED) for row in features]
    for number, found, failure in _judged(rows, client, asking, structured, progress):
        rows[number] = replace(rows[number], task=join_judgements(found) if found else NOT_JUDGED, failure=failure)
    return rows


def explaining(task: str | Path | Task | None, prompts: str | Path | Task = "explain") -> Task:
    """The prompts that explain, with the spans cleaned as a task wants."""
    asking = load_task(prompts)
    if asking.labels or len(asking.judgements) != 1:
        raise ValueError(f"Prompts to explain have one judgement, no labels. Received: prompts={asking.name!r}.")
    return cleaned_by(asking, task)


def expected_requests(
    features: Sequence[AnnotationRow], client: Chat, explain_task: Task, verify_task: Task | None, structured: bool
) -> list[ChatRequest]:
    """What `explain` and `verify` will send, as far as it is known: a summary that is not stands for itself."""
    asked = ask(features, explain_task)
    if verify_task is None:
        return asked.requests
    keys = [client.key(request) for request in asked.requests]
    guess = Answer(UNKNOWN_SUMMARY)
    answers = [client.cache.get(key) or guess for key in keys]
    return asked.requests + ask(_explained(features, asked, answers), verify_task, structured).requests


def total(one: Estimate, other: Estimate) -> Estimate:
    """Of two runs."""
    cost = None if one.cost is None or other.cost is None else one.cost + other.cost
    return Estimate(
        one.requests + other.requests,
        one.answered + other.answered,
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        cost,
    )


def _explained(features: Sequence[AnnotationRow], asked: Asked, answers: Sequence[Answer]) -> list[AnnotationRow]:
    rows = [replace(row, summary=CANNOT_TELL, verify=NOT_JUDGED, failure="") for row in features]
    for number, answer in zip(asked.places, answers, strict=True):
        told = without_thoughts(answer.text or "")
        if answer.ok and told:
            rows[number] = replace(rows[number], summary=parse_explanation(told))
        else:
            rows[number] = replace(rows[number], summary="", failure=_failure(answer))
    return rows


def _judged(
    rows: Sequence[AnnotationRow],
    client: Chat,
    task: Task,
    structured: bool,
    progress: bool | Callable[[int, int], object],
) -> list[tuple[int, list[tuple[str, str]], str]]:
    """For each row that was asked about: its number, label and answer of each judgement, or the failure."""
    places, requests, per_row = ask(rows, task, structured)
    answers = client.complete_many(requests, progress)
    found = []
    for position, number in enumerate(places):
        group = answers[position * per_row : (position + 1) * per_row]
        failures = [_failure(answer) for answer in group if not answer.ok]
        judgements = [] if failures else [read_judgement(answer.text or "") for answer in group]
        found.append((number, judgements, "; ".join(failures)))
    return found


def cleaned_by(asking: Task, task: str | Path | Task | None) -> Task:
    """The task with its spans cleaned as another wants."""
    return asking if task is None else replace(asking, remove=load_task(task).remove)


def shortened(
    features: Sequence[AnnotationRow], tokenizer: PreTrainedTokenizerBase, *, spans: int = 10, tokens: int = 10
) -> list[AnnotationRow]:
    """Features with their first spans alone, each cut to its last tokens: what SelfReg's code shows of them.

    Args:
        features: with `words`, best span first.
        tokenizer: a fast one, which knows the characters of its tokens.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"A fast tokenizer is needed. Received: {type(tokenizer).__name__}.")
    found = []
    for row in features:
        shown = row.spans()[:spans]
        if shown:
            places = tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            cut = [span[place[-tokens:][0][0] :] if place else span for span, place in zip(shown, places, strict=True)]
            row = replace(row, words="\n".join(f"Span {rank}: {span.strip()}" for rank, span in enumerate(cut, 1)))
        found.append(row)
    return found


def _untold(row: AnnotationRow) -> bool:
    return bool(row.spans()) and "cannot tell" in row.summary.lower()


def _failure(answer: Answer) -> str:
    return f"{answer.failure}: {answer.detail}" if answer.failure else "empty: thoughts without an answer"
