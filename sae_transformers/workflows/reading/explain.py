"""Say what features stand for, from their spans, with a language model; and have that verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from transformers import AutoTokenizer

from ...create_training_data.annotation import steps as annotate
from ...create_training_data.annotation.tables import AnnotationRow
from ...create_training_data.annotation.tasks import load_task
from ...create_training_data.llm.requests import Chat, ChatRequest
from ..results import Progress
from ..settings.annotation import ExplainSettings
from .annotation import AnnotationResult, Features, adapted, feature_rows
from .asking import ask_model


class ExplainResult(AnnotationResult):
    """Features with `summary`, and with `verify`, the label of a second look."""

    columns: ClassVar[tuple[str, ...]] = ("FeatureID", "Verify", "Summary", "Words")


def explain(
    features: Features,
    settings: ExplainSettings | None = None,
    *,
    client: Chat | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> ExplainResult:
    """Summaries of features from their spans, each compared with the spans once more.

    An answer is paid for once: the same call goes on where an earlier one was stopped.

    Args:
        features: a table of `spans` or `feature_table`, their folder, or rows.
        client: answers in place of the model that `settings.llm` names; it stays open.
        progress: called after each answer, for summaries and then for their verification.
        notice: called with each line of what is known before anything is sent, such as the estimate.

    Raises:
        ValueError: no model is named, there is no such task, or the tokenizer is not a fast one.
        OSError: the tokenizer is not there.
        ServiceRefused: the server takes no more requests.
    """
    settings = settings or ExplainSettings()
    asking = adapted(annotate.explaining(settings.task), settings.answers)
    checking = adapted(load_task("verify"), settings.answers) if settings.verify else None
    rows = feature_rows(features, settings.max_rows)
    if settings.tokenizer is not None:
        rows = annotate.shortened(rows, AutoTokenizer.from_pretrained(settings.tokenizer))

    def requests(chat: Chat) -> Sequence[ChatRequest]:
        cleaned = None if checking is None else annotate.cleaned_by(checking, settings.task)
        return annotate.expected_requests(rows, chat, asking, cleaned, settings.answers.structured)

    def run(chat: Chat) -> list[AnnotationRow]:
        found = annotate.explain(rows, chat, settings.task, prompts=asking, progress=progress or False)
        if checking is None:
            return found
        structured = settings.answers.structured
        return annotate.verify(
            found, chat, settings.task, prompts=checking, structured=structured, progress=progress or False
        )

    exchange, found = ask_model(client or settings.llm, settings.send, requests, run, notice=notice)
    return ExplainResult(rows if found is None else found, exchange)
