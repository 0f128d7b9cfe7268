"""Texts and labels of a classification task, from files or the Hub: one label of several, yes-or-no labels, pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..latents.text_input import text_source
from ..latents.texts import LABEL_NAMES, column_of, open_text

OTHER = "other"


@dataclass(frozen=True)
class ClassificationData:
    """Parts (`train`, perhaps `test`) of a task.

    texts: of pairs chosen and rejected in turn.
    labels: (n,) int64 of `binary` and `multi_class`, (n, n_labels) of `multi_label`, None of `pairwise`.
    names: of the labels; of `binary` the one that 0 stands for and the one that 1 does.
    """

    texts: dict[str, list[str]]
    labels: dict[str, Tensor | None]
    names: list[str]
    objective: str

    @property
    def pairs(self) -> bool:
        return self.objective == "pairwise"

    def base_options(self) -> dict[str, Any]:
        """What a Hugging Face classifier is loaded with; a yes-or-no decision is one logit of the second label."""
        names = self.names[1:] if self.objective == "binary" else self.names
        options: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        many = self.objective == "multi_class"
        return {**options, "problem_type": "single_label_classification" if many else "multi_label_classification"}

    def describe(self) -> str:
        """A line for people."""
        told = []
        for part, texts in self.texts.items():
            labels = self.labels.get(part)
            if labels is None:
                told.append(f"{part}: {len(texts) // 2:,} pairs")
            elif labels.ndim == 2:
                counts = zip(self.names, labels.sum(0).tolist(), strict=True)
                told.append(f"{part}: {len(texts):,} texts, " + ", ".join(f"{name} {n:,}" for name, n in counts))
            else:
                counts = Counter(labels.tolist())
                named = (f"{name} {counts[i]:,}" for i, name in enumerate(self.names))
                told.append(f"{part}: {len(texts):,} texts, " + ", ".join(named))
        return "\n".join(told)


def read_classification(
    sources: Mapping[str, Any],
    *,
    text_column: str = "text",
    label_column: str = "label",
    classes: Sequence[str] | None = None,
    pairs: tuple[str, str] | None = None,
    prompt_column: str | None = None,
) -> ClassificationData:
    """Read a task.

    Args:
        sources: part -> file, folder or Hub data set, as `open_text` takes it; or rows, a DataFrame, a `Dataset`.
            `train` must be there.
        label_column: words or numbers; two that occur make a yes-or-no decision. Several columns, separated by
            commas, are yes-or-no labels that may hold together.
        classes: labels that are kept apart; all others become "other".
        pairs: columns of the chosen and the rejected text, in place of text and label.
        prompt_column: of pairs, a text that stands before both, with an empty line between.

    Raises:
        ValueError: a column is missing, a row has no label, or a label occurs that the training rows have not.
    """
    rows = {
        part: list((open_text(source) if isinstance(source, str) else text_source(source)).rows())
        for part, source in sources.items()
    }
    sources = {part: source if isinstance(source, str) else part for part, source in sources.items()}  # for errors
    for part, found in rows.items():
        if not found:
            raise ValueError(f"There are no rows. Received: {sources[part]!r}.")
    if pairs is not None:
        texts = {part: _paired(found, sources[part], pairs, prompt_column) for part, found in rows.items()}
        return ClassificationData(texts, dict.fromkeys(rows), ["score"], "pairwise")
    texts = {part: [str(v) for v in column_of(found, sources[part], text_column)] for part, found in rows.items()}
    columns = label_column.split(",")
    if len(columns) > 1:
        tables = {
            part: [_yes_or_no(found, sources[part], column) for column in columns] for part, found in rows.items()
        }
        labels = {part: torch.tensor(table).T.contiguous() for part, table in tables.items()}
        return ClassificationData(texts, dict(labels), columns, "multi_label")
    words = {part: [_word(v) for v in column_of(found, sources[part], label_column)] for part, found in rows.items()}
    if classes is not None:
        unknown = set(classes) - set(words["train"])
        if unknown:
            raise ValueError(f"Every class must occur in the training rows. Received: none of {sorted(unknown)}.")
        words = {part: [word if word in classes else OTHER for word in found] for part, found in words.items()}
    names = sorted(set(words["train"]))
    if classes is not None:
        names = [*classes, *([OTHER] if OTHER in names else [])]
    index = {name: i for i, name in enumerate(names)}
    for part, found in words.items():
        if unknown := sorted(set(found) - set(index)):
            raise ValueError(
                f"The training rows have the labels {', '.join(names[:9])}. "
                f"Received: {unknown[:5]} in {sources[part]!r}."
            )
    if len(names) < 2:
        raise ValueError(f"Two labels or more must occur. Received: only {names[0]!r} in {sources['train']!r}.")
    labels = {part: torch.tensor([index[word] for word in found]) for part, found in words.items()}
    return ClassificationData(texts, dict(labels), names, "binary" if len(names) == 2 else "multi_class")


def _word(value: Any) -> str:
    return (
        str(int(value)) if isinstance(value, bool) or isinstance(value, float) and value.is_integer() else str(value)
    )


def _yes_or_no(rows: Sequence[Mapping[str, Any]], source: str, name: str) -> list[int]:
    values = [str(value).strip().lower() for value in column_of(rows, source, name)]
    if unknown := sorted(set(values) - set(LABEL_NAMES)):
        raise ValueError(f"Labels of {name!r} must be 0 or 1. Received: {unknown[:5]} in {source!r}.")
    return [LABEL_NAMES[value] for value in values]


def _paired(
    rows: Sequence[Mapping[str, Any]], source: str, pairs: tuple[str, str], prompt_column: str | None
) -> list[str]:
    sides = [column_of(rows, source, name) for name in pairs]
    prompts = [""] * len(rows) if prompt_column is None else column_of(rows, source, prompt_column)
    return [
        f"{prompt}\n\n{text}" if prompt else str(text)
        for prompt, *both in zip(prompts, *sides, strict=True)
        for text in both
    ]
