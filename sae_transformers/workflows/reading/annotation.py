"""What `explain` and `judge` have in common: features in, the task with the requests' settings, annotated rows out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...create_training_data.annotation.tables import COLUMNS, AnnotationRow, read_annotations, write_annotations
from ...create_training_data.annotation.tasks import Task
from ..results import html_table, to_frame
from ..settings.annotation import AnswerSettings
from .asking import AskedResult, Exchange

if TYPE_CHECKING:
    from pandas import DataFrame

Features = str | Path | Sequence[AnnotationRow]  # a table, a folder of `spans` or `feature_table`, or rows


@dataclass(frozen=True)
class AnnotationResult(AskedResult):
    """Annotated features.

    Args:
        rows: the features. Where nothing was asked, with `dry_run` or `batch_file`, they are as they were.
        exchange: what was asked of the language model, and what it took.
    """

    columns: ClassVar[tuple[str, ...]] = tuple(COLUMNS)

    rows: list[AnnotationRow] = field(repr=False)
    exchange: Exchange

    def label(self, row: AnnotationRow) -> str:
        """What a feature is counted as."""
        return row.verify

    def counts(self) -> Counter[str]:
        """Label -> features that have it."""
        return Counter(self.label(row) for row in self.rows)

    def summary(self) -> list[str]:
        """What was used, and how many features have each label."""
        counted = ", ".join(f"{name[:40]}: {count:,}" for name, count in self.counts().most_common(12))
        return [*self.exchange.used(), counted]

    def failure(self) -> str | None:
        """A sentence on the features that have no answer; None if all have one."""
        failures = Counter(row.failure for row in self.rows if row.failure)
        if not failures:
            return None
        reason, count = failures.most_common(1)[0]
        return (
            f"{sum(failures.values()):,} of {len(self.rows):,} features have no answer, {count:,} of them because: "
            f"{reason}. The same command asks for these only."
        )

    def to_frame(self) -> DataFrame:
        """The table, with the reason where there is no answer."""
        return to_frame([dataclasses.asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """As JSON: labels, what was used, and the rows."""
        return {
            **self.used(),
            "labels": dict(self.counts()),
            "features": [dataclasses.asdict(row) for row in self.rows],
        }

    def save(self, path: str | Path) -> list[Path]:
        """Write the table as .tsv and .parquet; the files.

        Args:
            path: without ending, or with one of the two.
        """
        base = Path(path)
        base = base.with_suffix("") if base.suffix in (".tsv", ".parquet") else base
        return [write_annotations(self.rows, f"{base}{ending}", self.columns) for ending in (".tsv", ".parquet")]

    def _repr_html_(self) -> str:
        shown = [{**dataclasses.asdict(row), "words": row.words[:200]} for row in self.rows]
        return html_table(shown)


def feature_rows(features: Features, max_rows: int | None) -> list[AnnotationRow]:
    """The first of some features, read if they are a table or a folder of one."""
    rows = read_annotations(features) if isinstance(features, (str, Path)) else list(features)
    return rows[:max_rows]


def adapted(task: Task, answers: AnswerSettings) -> Task:
    """The task with what the settings say of its requests."""
    return replace(
        task, max_tokens=answers.max_answer_tokens or task.max_tokens, extra={**task.extra, **answers.fields()}
    )
