"""Tasks for a judge of features: what is asked, in a YAML file of tasks/ or of the user's own.

name: toxicity
labels: ["yes", "probably", "maybe", "no"]     none: a free answer
template: "Feature: {summary}\\nSpans:\\n{spans}"
judgements:                                     one or several questions on each feature
  - name: harm
    role: who the judge is and what it decides
    guideline: [a point, another point]
    few_shots: [{summary: ..., spans: [..., ...], answer: ...}]
max_spans: 10                                   shown of a feature, the strongest first
remove: ["Query-\\\\d+: "]                      regular expressions, cut from the spans
max_tokens: 512                                 of an answer
extra: {}                                       further fields of the request
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..llm.requests import ChatRequest
from .parsing import decision_format
from .tables import AnnotationRow

TASKS = Path(__file__).parent / "task_files"
YAML_WORDS = {True: "yes", False: "no"}  # what YAML makes of labels without quotes
DECIDE = (
    "First discuss the feature in two or three sentences. Then end with one line of exactly this form, "
    "with one of the labels in it:\nFinal Decision: [[ {labels} ]]"
)


@dataclass(frozen=True)
class Judgement:
    """One question: a role, the points of a guideline, and examples with `spans`, `answer` and maybe `summary`."""

    name: str
    role: str
    guideline: tuple[str, ...] = ()
    few_shots: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Task:
    """See the head of this file."""

    name: str
    judgements: tuple[Judgement, ...]
    template: str = "Feature: {summary}\n\nText spans:\n{spans}"
    labels: tuple[str, ...] = ()
    max_spans: int = 10
    remove: tuple[str, ...] = ()
    max_tokens: int = 512
    extra: Mapping[str, Any] = field(default_factory=dict)

    def asks_about(self, row: AnnotationRow) -> bool:
        """Whether there is something to ask: spans, and a summary if that is judged."""
        return any(self._clean(span) for span in row.spans()) and (not self.labels or row.has_summary)

    def requests(self, row: AnnotationRow, structured: bool = True) -> list[ChatRequest]:
        """A request for each judgement; `structured` asks for JSON where there are labels."""
        answer_format = decision_format(self.labels) if structured and self.labels else None
        user = {"role": "user", "content": self._question(row.summary, row.spans())}
        return [
            ChatRequest(
                [*self._introduction(judgement), user],
                max_tokens=self.max_tokens,
                response_format=answer_format,
                extra=self.extra,
            )
            for judgement in self.judgements
        ]

    def _question(self, summary: str, spans: Sequence[str]) -> str:
        cleaned = [self._clean(span) for span in spans]
        shown = [span for span in cleaned if span][: self.max_spans]
        numbered = "\n".join(f"Span {number}: {span}" for number, span in enumerate(shown, 1))
        return self.template.format(summary=summary.strip(), spans=numbered)

    def _clean(self, span: str) -> str:
        for pattern in self.remove:
            span = re.sub(pattern, "", span)
        return span.strip()

    def _introduction(self, judgement: Judgement) -> list[dict[str, str]]:
        parts = [judgement.role.strip()]
        if judgement.guideline:
            parts.append("\n".join(f"- {point.strip()}" for point in judgement.guideline))
        if self.labels:
            parts.append(DECIDE.format(labels=" / ".join(self.labels)))
        messages = [{"role": "system", "content": "\n\n".join(parts)}]
        for example in judgement.few_shots:
            question = self._question(str(example.get("summary", "")), [str(span) for span in example["spans"]])
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": str(example["answer"]).strip()})
        return messages


def task_names() -> list[str]:
    """The tasks that come with the library."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def load_task(source: str | Path | Task) -> Task:
    """A task by its name, or from a YAML file.

    Raises:
        ValueError: there is no such task, or its file is wrong.
    """
    if isinstance(source, Task):
        return source
    path = TASKS / f"{source}.yaml" if str(source) in task_names() else Path(source)
    if not path.is_file():
        raise ValueError(f"A task is one of {task_names()} or a YAML file. Received: task={str(source)!r}.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _task(data)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, re.error) as error:
        raise ValueError(f"{str(path)!r} is no task: {error}") from error


def _task(data: Any) -> Task:
    _known(data, Task, ("name", "judgements"))
    judgements = []
    for part in data["judgements"]:
        _known(part, Judgement, ("name", "role"))
        shots = tuple(part.get("few_shots", ()))
        for shot in shots:
            if not isinstance(shot, Mapping) or not {"spans", "answer"} <= shot.keys():
                raise ValueError(f"an entry of few_shots has spans and answer. Received: {shot!r}.")
        judgements.append(Judgement(part["name"], part["role"], tuple(part.get("guideline", ())), shots))
    if not judgements:
        raise ValueError("judgements must have at least one entry. Received: none.")
    labels = tuple(YAML_WORDS[label] if isinstance(label, bool) else str(label) for label in data.get("labels", ()))
    rest = {name: data[name] for name in ("template", "max_spans", "max_tokens", "extra") if name in data}
    task = Task(data["name"], tuple(judgements), labels=labels, remove=tuple(data.get("remove", ())), **rest)
    for pattern in task.remove:
        re.compile(pattern)
    task.template.format(summary="", spans="")  # a field of another name is told here
    if "{spans}" not in task.template:
        raise ValueError(f"the template must have {{spans}}. Received: {task.template!r}.")
    return task


def _known(data: Any, kind: type, needed: Sequence[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"expected fields with values. Received: {data!r}.")
    names = [part.name for part in fields(kind)]
    if wrong := [name for name in data if name not in names]:
        raise ValueError(f"the fields are {names}. Received: {wrong}.")
    if lacking := [name for name in needed if not data.get(name)]:
        raise ValueError(f"{lacking} must be there. Received: {sorted(data)}.")
