"""Ask a chat model about features: what each stands for (`annotate.explain`), or one question about all of them.

    rows = annotation_rows(table.top_tokens, table.contexts)
    rows = annotate.explain(rows, client)
    answers = ask_about_features("Does the feature concern gender?", rows, client)

Many features share a request, and each gets an answer of its own, in JSON. Features that an answer leaves out are
asked about again, one by one. Answers stay in the client's cache, so that a run that was cut off is called again in
the same way; budgets are the client's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...latents.output_files import whole_file
from ...latents.text_files import write_csv
from ..llm.requests import Answer, Chat, ChatRequest
from .parsing import clean_label, decision_format, object_format, object_schema, read_judgement, without_thoughts
from .tables import AnnotationRow

LABELS = ("yes", "maybe", "no")
SPANS = 8  # shown of a feature
SPAN_LENGTH = 200  # characters shown of a span
TOKENS_OF_ANSWER = 60  # for each feature of a request
ROLE = (
    "You study features of a sparse autoencoder inside a language model. For each feature you see the tokens that it "
    "makes more likely, and where they are known texts on which it is active. Judge by these alone."
)
MANY = (
    "Answer for every feature, in this JSON and nothing else:\n"
    '{{"answers": [{{"feature": number, "reason": "a few words", "answer": one of {labels}}}]}}'
)
ONE = "Discuss it in one sentence. Then end with one line of exactly this form:\nFinal Decision: [[ {labels} ]]"


@dataclass(frozen=True)
class FeatureAnswer:
    """answer: one of the labels, "" where there is none; then `failure` says why. reason: in the model's words."""

    feature: int
    answer: str
    reason: str = ""
    failure: str = ""


def annotation_rows(
    top_tokens: Sequence[Sequence[str]], contexts: Sequence[Sequence[str]] | None = None
) -> list[AnnotationRow]:
    """A feature table as rows that `annotate.explain` and `ask_about_features` take: a first span with the tokens,
    then a span for each context. Row i is feature i."""
    rows = []
    for i, tokens in enumerate(top_tokens):
        spans = ["Tokens it makes likelier: " + ", ".join(repr(token) for token in tokens)]
        spans += [text for text in (contexts[i] if contexts is not None else ()) if text.strip()]
        words = "\n".join(f"Span {n}: {' '.join(span.split())}" for n, span in enumerate(spans, 1))
        rows.append(AnnotationRow(i, words))
    return rows


def question_requests(
    question: str, rows: Sequence[AnnotationRow], labels: Sequence[str] = LABELS, *, at_once: int = 20
) -> list[ChatRequest]:
    """The requests for the rows with spans, `at_once` rows to a request.

    Raises:
        ValueError: an empty question, fewer than two labels or equal ones, or no row in a request.
    """
    labels = [clean_label(label) for label in labels]
    if not question.strip():
        raise ValueError(f"Expected a question. Received: question={question!r}.")
    if len(set(labels)) < 2 or len(set(labels)) < len(labels) or not all(labels):
        raise ValueError(f"Expected two answers or more to choose from, all different. Received: labels={labels!r}.")
    if at_once < 1:
        raise ValueError(f"`at_once` must be 1 or more. Received: at_once={at_once!r}.")
    asked = [row for row in rows if row.spans()]
    groups = [asked[start : start + at_once] for start in range(0, len(asked), at_once)]
    return [_request(question, group, labels) for group in groups]


def ask_about_features(
    question: str,
    rows: Sequence[AnnotationRow],
    client: Chat,
    labels: Sequence[str] = LABELS,
    *,
    at_once: int = 20,
    progress: bool | Callable[[int, int], object] = True,
) -> list[FeatureAnswer]:
    """An answer for each feature, in the order of the rows.

    Args:
        question: such as "Does the feature concern gender?".
        rows: of `annotation_rows`, or of `read_annotations`; a summary is shown too. Those without spans are not asked
            about and get the failure "no spans".
        client: `LLMClient` or `LocalChat`. A small local model needs `at_once=1`: it is then held to the labels.
        labels: the answers to choose from.
        at_once: features of a request.

    Raises:
        ValueError: as `question_requests`.
    """
    labels = [clean_label(label) for label in labels]
    asked = [row for row in rows if row.spans()]
    found: dict[int, FeatureAnswer] = {}
    for size in dict.fromkeys((at_once, 1)):  # what is left out is asked again alone
        waiting = [row for row in asked if row.feature_id not in found]
        failed: dict[int, str] = {}
        answers = client.complete_many(question_requests(question, waiting, labels, at_once=size), progress)
        for start, answer in zip(range(0, len(waiting), size), answers, strict=True):
            group = waiting[start : start + size]
            read = _read(answer, [row.feature_id for row in group], labels)
            found |= {one.feature: one for one in read}
            if not answer.ok:
                failed |= {row.feature_id: f"{answer.failure}: {answer.detail}" for row in group}
        found |= {number: FeatureAnswer(number, "", failure=why) for number, why in failed.items()}
    missing = {row.feature_id: FeatureAnswer(row.feature_id, "", failure="no spans") for row in rows}
    missing |= {row.feature_id: FeatureAnswer(row.feature_id, "", failure="no answer in the form") for row in asked}
    return [found.get(row.feature_id, missing[row.feature_id]) for row in rows]


def write_answers(answers: Sequence[FeatureAnswer], path: str | Path) -> Path:
    """Write them as csv: feature, answer, reason, failure; whole, or not at all."""
    with whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        rows = [(one.feature, one.answer, one.reason, one.failure) for one in answers]
        write_csv(file, [("feature", "answer", "reason", "failure"), *rows])
    return Path(path)


def answers_format(labels: Sequence[str]) -> dict[str, Any]:
    """A `response_format` for a list of feature, reason and answer, one of the labels."""
    properties = {
        "feature": {"type": "integer"},
        "reason": {"type": "string"},
        "answer": {"type": "string", "enum": list(labels)},
    }
    return object_format("features", {"answers": {"type": "array", "items": object_schema(properties)}})


def parse_answers(text: str, features: Sequence[int], labels: Sequence[str]) -> list[FeatureAnswer]:
    """Answers about these features from JSON, from JSON that was cut off, or from lines like "Feature 12: yes, ...".

    Features that were not asked about, labels that are none and second answers are left out.
    """
    text = without_thoughts(text)
    entries: list[tuple[Any, Any, Any]] = []
    for part in re.findall(r"\{[^{}]*\}", text):
        try:
            one = json.loads(part)
        except ValueError:
            continue
        if isinstance(one, Mapping):
            entries.append((one.get("feature"), one.get("answer"), one.get("reason", "")))
    if not entries:
        options = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
        line = rf"^\W*(?:feature\s*)?(\d+)\W+({options})\b\W*(.*)$"
        entries = [(int(n), a, r) for n, a, r in re.findall(line, text, flags=re.IGNORECASE | re.MULTILINE)]
    found: dict[int, FeatureAnswer] = {}
    for feature, answer, reason in entries:
        number = int(feature) if isinstance(feature, (int, str)) and str(feature).isdecimal() else -1
        label = clean_label(str(answer))
        if number in features and label in labels and number not in found:
            found[number] = FeatureAnswer(number, label, str(reason))
    return list(found.values())


def _read(answer: Answer, features: Sequence[int], labels: Sequence[str]) -> list[FeatureAnswer]:
    if not answer.ok:
        return []
    text = answer.text or ""
    found = parse_answers(text, features, labels)
    if not found and len(features) == 1:
        label, told = read_judgement(text)
        if label in labels:
            found = [FeatureAnswer(features[0], label, told)]
    return found


def _request(question: str, rows: Sequence[AnnotationRow], labels: Sequence[str]) -> ChatRequest:
    shown = "\n\n".join(_shown(row) for row in rows)
    options = " / ".join(labels)
    if len(rows) == 1:
        user = f"{question.strip()}\n\n{shown}\n\n{ONE.format(labels=options)}"
        form = decision_format(labels)
    else:
        user = f"{question.strip()}\n\n{shown}\n\n{MANY.format(labels=json.dumps(list(labels)))}"
        form = answers_format(labels)
    messages = [{"role": "system", "content": ROLE}, {"role": "user", "content": user}]
    return ChatRequest(messages, max_tokens=max(160, TOKENS_OF_ANSWER * len(rows)), response_format=form)


def _shown(row: AnnotationRow) -> str:
    lines = [f"Feature {row.feature_id}" + (f": {row.summary}" if row.has_summary else "")]
    lines += [f"- {span[:SPAN_LENGTH]}" for span in row.spans()[:SPANS]]
    return "\n".join(lines)
