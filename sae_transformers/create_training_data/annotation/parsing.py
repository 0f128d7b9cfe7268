"""From a model's answer to a label or a summary, and from labels to the features that a task does not intend.

The rules are those of SelfReg (https://huggingface.co/papers/2502.14133), so that its published tables read the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

CANNOT_TELL = "Cannot Tell."
NOT_JUDGED = "-"
SEPARATOR = "|||"  # label ||| full answer [||| label ||| full answer]
INTENDED = ("yes", "probably")


class Annotated(Protocol):
    """A row of a table of features."""

    @property
    def feature_id(self) -> int: ...
    @property
    def words(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def task(self) -> str: ...


def parse_decision(text: str) -> str:
    """The decision at the end of an answer, in lower case.

    What follows the last "decision": of that what is inside `[[ ]]`, from the first to the last; and if it begins
    with ": ", what comes before the first full stop. Without either, all of it. The result need not be a label:
    "[[no]] because [[x]]" gives "no]] because [[x".
    """
    found = text.lower().split("decision")[-1]
    if "[[" in found and "]]" in found:
        found = found.split("[[", 1)[-1].rsplit("]]", 1)[0].strip()
    if found.startswith(": "):
        found = found[2:].split(".", 1)[0].strip()
    return found


def clean_label(label: str) -> str:
    """A label without brackets and outer spaces, in lower case."""
    return label.replace("[", "").replace("]", "").strip().lower()


def parse_explanation(texts: str | Sequence[str]) -> str:
    """One summary from one or several answers: of each the first sentence, joined with "or".

    Answers with "cannot tell" are left out; if none is left the summary is "Cannot Tell."
    """
    answers = [texts] if isinstance(texts, str) else texts
    told = [answer for answer in answers if "cannot tell" not in answer.lower()]
    sentences = [sentence for answer in told if (sentence := answer.split(".", 1)[0].strip())]
    return f"{' or '.join(sentences)}." if sentences else CANNOT_TELL


def without_thoughts(text: str) -> str:
    """The answer of a model that thinks aloud, without `<think>...</think>`; nothing if the thoughts never end."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return text.partition("<think>")[0].strip()


def decision_format(labels: Sequence[str]) -> dict[str, Any]:
    """A `response_format` for an object of `reason` and `decision`, one of the labels. The reason comes first, so
    that the decision can follow from it."""
    properties = {"reason": {"type": "string"}, "decision": {"type": "string", "enum": list(labels)}}
    return object_format("judgement", properties)


def object_format(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """A `response_format` for an object with these properties, and no others."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": object_schema(properties)}}


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these properties, and no others."""
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def decisions_of(response_format: Mapping[str, Any] | None) -> list[str]:
    """The labels of `decision_format`; none of any other format."""
    try:
        return list((response_format or {})["json_schema"]["schema"]["properties"]["decision"]["enum"])
    except (KeyError, TypeError):
        return []


def read_judgement(text: str) -> tuple[str, str]:
    """Label and full answer, from JSON with `decision` and `reason` or from plain text.

    The full answer of JSON is put into words that `parse_decision` reads. JSON that was cut off is read as far as it
    goes. Of models that think aloud only the answer is read.
    """
    text = without_thoughts(text)
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text)
    try:
        found = json.loads(bare)
    except ValueError:
        found = None
    if isinstance(found, Mapping) and isinstance(found.get("decision"), str):
        label = clean_label(found["decision"])
        return label, f"{found.get('reason', '')} Final Decision: [[ {label} ]]".strip()
    if bare.startswith("{") and (cut := re.findall(r'"decision"\s*:\s*"([^"]*)"', bare)):
        return clean_label(cut[-1]), text
    return clean_label(parse_decision(text)), text


def join_judgements(judgements: Iterable[tuple[str, str]]) -> str:
    """The `Task` column of labels and full answers."""
    return SEPARATOR.join(part.replace(SEPARATOR, "|") for judgement in judgements for part in judgement)


def task_labels(task: str) -> list[str]:
    """The labels in a `Task` column: its parts 0, 2, ..."""
    return [clean_label(part) for part in task.split(SEPARATOR)[::2]]


def unintended_mask(
    rows: Iterable[Annotated], judgements: Sequence[int] = (0,), intended: Sequence[str] = INTENDED
) -> list[bool]:
    """For each row whether the task does not intend its feature: the judge said neither "yes" nor "probably".

    "maybe", "no" and answers that are no label count as unintended. A feature without spans, without a summary
    ("Cannot Tell.") or without a judgement ("-") never does: nothing is known of it.

    Args:
        rows: with `words`, `summary` and `task`.
        judgements: which of the judgements in `task` count, from 0; a feature is unintended if all of them say so.
        intended: the labels that count as intended.

    Raises:
        ValueError: a row has fewer judgements than asked for.
    """
    if not judgements or min(judgements) < 0:
        raise ValueError(f"`judgements` must be numbers from 0, at least one. Received: judgements={judgements!r}.")
    wanted = {clean_label(label) for label in intended}
    mask = []
    for row in rows:
        labels = task_labels(row.task)
        unknown = "span" not in row.words.lower() or "cannot tell" in row.summary.lower()
        if unknown or labels in ([NOT_JUDGED], [""]):
            mask.append(False)
            continue
        if max(judgements) >= len(labels):
            raise ValueError(
                f"Feature {row.feature_id} has {len(labels)} judgement(s). Received: judgements={tuple(judgements)!r}."
            )
        mask.append(all(labels[number] not in wanted for number in judgements))
    return mask


def unintended_features(
    rows: Sequence[Annotated], judgements: Sequence[int] = (0,), intended: Sequence[str] = INTENDED
) -> list[int]:
    """The ids of the features that `unintended_mask` marks."""
    mask = unintended_mask(rows, judgements, intended)
    return [row.feature_id for row, marked in zip(rows, mask, strict=True) if marked]
