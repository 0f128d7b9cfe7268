"""Ask a language model one question about each feature of a table, many features to a request."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...create_training_data.annotation.questions import (
    FeatureAnswer,
    ask_about_features,
    question_requests,
    write_answers,
)
from ...create_training_data.llm.requests import Chat, ChatRequest
from ..results import Progress, Result
from ..settings.ask_features import AskFeaturesSettings
from .annotation import Features, feature_rows
from .asking import AskedResult, Exchange, ask_model


@dataclass(frozen=True)
class AskFeaturesResult(AskedResult, Result):
    """An answer for each feature.

    Args:
        question: what was asked.
        answers: of each feature, in the order of the table; none where nothing was asked, with `dry_run`.
        labels: the answers there were to choose from.
        exchange: what was asked of the language model, and what it took.
    """

    question: str
    answers: list[FeatureAnswer] = field(repr=False)
    labels: tuple[str, ...]
    exchange: Exchange

    def counts(self) -> Counter[str]:
        """Answer -> features that have it."""
        return Counter(row.answer or "no answer" for row in self.answers)

    def features(self, answer: str | None = None) -> list[int]:
        """The features with an answer, by default the first there was to choose from."""
        return [row.feature for row in self.answers if row.answer == (answer or self.labels[0])]

    def summary(self) -> list[str]:
        """What was used, how many features have each answer, and which have the first."""
        counted = ", ".join(f"{name}: {count:,}" for name, count in self.counts().most_common())
        first = ", ".join(map(str, self.features()[:50])) or "none"
        return [*self.exchange.used(), counted, f"{self.labels[0]}: features {first}"]

    def failure(self) -> str | None:
        """A sentence on the features that have no answer; None if all have one."""
        failures = [row.failure for row in self.answers if row.failure]
        if not failures:
            return None
        return f"{len(failures):,} of {len(self.answers):,} features have no answer, one because: {failures[0]}"

    def rows(self) -> list[dict[str, Any]]:
        """Feature, answer, reason, failure of each."""
        return [dataclasses.asdict(row) for row in self.answers]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"question": self.question, "model": self.exchange.model, "answers": self.rows()}

    def save(self, path: str | Path) -> list[Path]:
        """Write `rows()` as .csv; the file."""
        return [write_answers(self.answers, path)]


def ask_features(
    features: Features,
    question: str,
    settings: AskFeaturesSettings | None = None,
    *,
    client: Chat | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> AskFeaturesResult:
    """An answer for each feature to one question; features that a reply leaves out are asked about again alone.

    An answer is paid for once: the same call goes on where an earlier one was stopped.

    Args:
        features: a table of `spans`, `explain` or `feature_table`, their folder, or rows.
        question: such as "Does the feature concern gender?".
        client: answers in place of the model that `settings.llm` names; it stays open.
        progress: called with (requests answered, requests).
        notice: called with each line of what is known before anything is sent, such as the estimate.

    Raises:
        ValueError: no model is named, or there is no question.
        ServiceRefused: the server takes no more requests; what was answered is kept.
    """
    settings = settings or AskFeaturesSettings()
    labels = settings.answers
    rows = feature_rows(features, settings.max_rows)
    at_once = 1 if client is None and settings.llm.local_model is not None else settings.features_per_request

    def requests(chat: Chat) -> Sequence[ChatRequest]:
        return question_requests(question, rows, labels, at_once=at_once)

    def run(chat: Chat) -> list[FeatureAnswer]:
        return ask_about_features(question, rows, chat, labels, at_once=at_once, progress=progress or False)

    exchange, found = ask_model(client or settings.llm, settings.send, requests, run, notice=notice)
    return AskFeaturesResult(question, found or [], labels, exchange)
