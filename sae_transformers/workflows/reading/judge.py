"""Say of each explained feature whether a task intends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...create_training_data.annotation import steps as annotate
from ...create_training_data.annotation.parsing import NOT_JUDGED, task_labels, unintended_features
from ...create_training_data.annotation.tables import AnnotationRow
from ...create_training_data.annotation.tasks import Task, load_task
from ...create_training_data.llm.requests import Chat, ChatRequest
from ..results import Progress
from ..settings.annotation import JudgeSettings
from .annotation import AnnotationResult, Features, adapted, feature_rows
from .asking import ask_model


@dataclass(frozen=True)
class JudgeResult(AnnotationResult):
    """Features with `task`, label|||full answer of each judgement.

    Args:
        labels: that the task has.
    """

    columns: ClassVar[tuple[str, ...]] = ("FeatureID", "Task", "Verify", "Summary", "Words")

    labels: tuple[str, ...]

    def label(self, row: AnnotationRow) -> str:
        return ", ".join(task_labels(row.task))

    def unintended(self, judgements: Sequence[int] = (0,)) -> list[int]:
        """The features that the task does not intend: what a classifier should not rest on."""
        return unintended_features(self.rows, judgements)

    def strange(self) -> int:
        """How many answers have no label of the task's; they count as unintended."""
        known = (*self.labels, NOT_JUDGED)
        return sum(any(part not in known for part in task_labels(row.task)) for row in self.rows)

    def summary(self) -> list[str]:
        lines = super().summary()
        if strange := self.strange():
            lines.append(
                f"{strange:,} answers are no label and count as unintended: does the model keep to the format?"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "unintended": self.unintended()}


def judge(
    features: Features,
    task: str | Path | Task,
    settings: JudgeSettings | None = None,
    *,
    client: Chat | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> JudgeResult:
    """Whether a task intends each feature. The others are what a classifier should not use.

    An answer is paid for once: the same call goes on where an earlier one was stopped.

    Args:
        features: a table that `explain` wrote, or its rows.
        task: toxicity, helpfulness, disease, or a YAML file.
        client: answers in place of the model that `settings.llm` names; it stays open.
        progress: called after each answer.
        notice: called with each line of what is known before anything is sent, such as the estimate.

    Raises:
        ValueError: no feature has a summary, the task is unknown or has no labels, or no model is named.
        ServiceRefused: the server takes no more requests.
    """
    settings = settings or JudgeSettings()
    asking = adapted(load_task(task), settings.answers)
    rows = feature_rows(features, settings.max_rows)
    structured = settings.answers.structured
    if not any(row.summary.strip() for row in rows):
        of = f" of {features}" if isinstance(features, (str, Path)) else ""
        raise ValueError(f"No feature{of} has a summary; run explain first.")

    def requests(chat: Chat) -> Sequence[ChatRequest]:
        return annotate.ask(rows, asking, structured).requests

    def run(chat: Chat) -> list[AnnotationRow]:
        return annotate.judge(rows, chat, asking, structured=structured, progress=progress or False)

    exchange, found = ask_model(client or settings.llm, settings.send, requests, run, notice=notice)
    return JudgeResult(rows if found is None else found, exchange, asking.labels)
