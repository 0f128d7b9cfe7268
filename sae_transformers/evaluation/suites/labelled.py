"""Options of labelled texts, which several suites read."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ...latents.settings import check_integers
from ..results import DataFile
from .suite import source_file


class LabelledRows(NamedTuple):
    """texts, labels: of the rows that were drawn. file: what they were read from."""

    texts: list[str]
    labels: list[int]
    file: DataFile

    def sides(self, rows: list[int]) -> tuple[list[str], list[str]]:
        """Of some rows the texts with the concept and those without."""
        return [self.texts[i] for i in rows if self.labels[i]], [self.texts[i] for i in rows if not self.labels[i]]


@dataclass(frozen=True)
class ColumnOptions:
    """Columns of tables.

    Args:
        text_column: column of the text.
        label_column: column of the label, 0 or 1.
    """

    PANEL: ClassVar[str] = "Reading"

    text_column: str = "text"
    label_column: str = "label"


@dataclass(frozen=True)
class LabelledOptions:
    """Labelled texts.

    Args:
        labelled: rows with a text and a label, 1 where the concept is.
        max_labelled: rows of each label, drawn by the seed.
    """

    PANEL: ClassVar[str] = "Suites detection and steering"

    labelled: str | None = None
    max_labelled: int = 500
    columns: ColumnOptions = ColumnOptions()

    def __post_init__(self) -> None:
        check_integers(self, max_labelled=1)

    def read(self, seed: int) -> LabelledRows:
        """At most `max_labelled` texts of each label, in the order of the rows."""
        from ...latents.labelled_texts import read_labelled_texts

        found = read_labelled_texts(str(self.labelled), self.columns.text_column, self.columns.label_column)
        draw, kept = random.Random(seed), []
        for value in (0, 1):
            members = [i for i, label in enumerate(found.labels) if label == value]
            kept += draw.sample(members, min(len(members), self.max_labelled))
        kept.sort()
        file = source_file(str(self.labelled), [found.texts, found.labels], len(found.texts))
        return LabelledRows([found.texts[i] for i in kept], [found.labels[i] for i in kept], file)

    def told(self) -> dict[str, object]:
        """As a record keeps it, without the file."""
        columns = {"text_column": self.columns.text_column, "label_column": self.columns.label_column}
        return {"max_labelled": self.max_labelled, **columns}
