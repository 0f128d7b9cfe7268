"""Rows with a text and a label, 1 where a concept is present and 0 where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .texts import LABEL_NAMES, open_text


class LabelledTexts(NamedTuple):
    """texts: non-empty, each once. labels: 0 or 1 for each. origin: for people."""

    texts: list[str]
    labels: list[int]
    origin: str


def read_labelled_texts(source: str, text_column: str = "text", label_column: str = "label") -> LabelledTexts:
    """Read texts with binary labels.

    Args:
        source: a file or folder, or a Hub data set, whose split `train` is read; see `open_text`.
        text_column: name of the column with the text.
        label_column: name of the column with the label: 0 and 1, or their names (neg, pos, negative, positive,
            false, true).

    Raises:
        ValueError: a column is missing, a label is unknown, a row is broken, or one class does not occur.
        OSError: the source cannot be found or read.
    """
    path = Path(source)
    origin = path.name if path.exists() else f"{source} of the Hugging Face Hub"
    return labelled_rows(open_text(source).rows(), source, text_column, label_column, origin=origin)


def labelled_rows(
    rows: Iterable[Mapping[str, Any]], source: str, text_column: str, label_column: str, *, origin: str
) -> LabelledTexts:
    """The same of rows that are read already."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for column in (text_column, label_column):
            if row.get(column) is None:
                known = ", ".join(repr(c) for c in row if c is not None)
                raise ValueError(
                    f"Every row of {source!r} needs a column {column!r}; row {number} has none. "
                    f"Received: columns {known or 'none'}."
                )
        label = LABEL_NAMES.get(str(row[label_column]).strip().lower())
        if label is None:
            raise ValueError(
                f"Labels must be 0 or 1 (or neg, pos, negative, positive, false, true). "
                f"Received: {label_column}={row[label_column]!r} in row {number} of {source!r}."
            )
        text = str(row[text_column]).strip()
        if text:
            seen.setdefault(text, label)
    if set(seen.values()) != {0, 1}:
        raise ValueError(f"Both labels must occur in {source!r}. Received: {sorted(set(seen.values()))}.")
    return LabelledTexts(list(seen), list(seen.values()), origin)
