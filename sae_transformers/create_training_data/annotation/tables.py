"""Tables of features in SelfReg's layout: tab-separated, one line a feature; newlines, tabs and backslashes of a text
are written as \\n, \\t and \\\\. A backslash before another character is read as it is: older tables marked none.

FeatureID  Words                               spans of each feature, "Span 1: ..." to a line
FeatureID  Verify  Summary  Words              after explain
FeatureID  Task  Verify  Summary  Words        after judge
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...latents.output_files import whole_file
from .parsing import NOT_JUDGED, SEPARATOR, clean_label, unintended_features, unintended_mask

COLUMNS = {"FeatureID": "feature_id", "Task": "task", "Verify": "verify", "Summary": "summary", "Words": "words"}
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t"}
RETURN = {"\r": "\\r"}  # written in tables of spans; left out in those of annotations, where \\r was never marked


@dataclass(frozen=True)
class AnnotationRow:
    """A feature and what is known of it.

    words: its spans, "Span 1: ..." to a line; empty if it never fired. summary: what it stands for. verify: the
    label of a second look at the summary. task: label|||full answer; "-" where verify and task are not judged.
    failure: why the last step has no answer; empty if it has one. It is in Parquet only.
    """

    feature_id: int
    words: str
    summary: str = ""
    verify: str = NOT_JUDGED
    task: str = NOT_JUDGED
    failure: str = ""

    @property
    def has_summary(self) -> bool:
        return bool(self.summary.strip()) and "cannot tell" not in self.summary.lower()

    def spans(self) -> list[str]:
        """The spans without their numbers."""
        return [span.strip() for span in re.split(r"(?:^|\n)\s*Span \d+: ?", self.words) if span.strip()]


@dataclass(frozen=True)
class FeatureAnnotation:
    """What people or models said of a feature.

    Args:
        explanation: as it was given; "Cannot Tell." where the spans have no common meaning.
        intended: whether a task intends it; None where that is not judged.
        judgements: label and full answer of each.
        verified: label of a second look at the explanation.
        failed: the last step has no answer.
        has_spans: there is a text on which it fired.
    """

    explanation: str = ""
    intended: bool | None = None
    judgements: Sequence[tuple[str, str]] = ()
    verified: str = ""
    failed: bool = False
    has_spans: bool = True

    @property
    def meaning(self) -> str:
        """The explanation; empty where it says that there is none."""
        return "" if "cannot tell" in self.explanation.lower() else self.explanation

    @property
    def judged(self) -> str:
        """The labels of all judgements."""
        return ", ".join(label for label, _ in self.judgements if label)


def feature_annotations(rows: Sequence[AnnotationRow], judgement: int | None = None) -> dict[int, FeatureAnnotation]:
    """Rows of a table by feature.

    Args:
        judgement: which of several judgements says what is intended, from 0; None: none does.

    Raises:
        ValueError: a row has no such judgement.
    """
    judged = [row for row in rows if row.task not in (NOT_JUDGED, "")]
    answers = {row.feature_id: row.task.split(SEPARATOR) for row in judged}
    unintended: dict[int, bool] = {}
    if judgement is not None:
        unintended = dict(zip(answers, unintended_mask(judged, (judgement,)), strict=True))
    found = {}
    for row in rows:
        parts = answers.get(row.feature_id, [])
        known = row.has_summary and "span" in row.words.lower() and row.feature_id in unintended
        found[row.feature_id] = FeatureAnnotation(
            row.summary.strip(),
            not unintended[row.feature_id] if known else None,
            [(clean_label(label), answer) for label, answer in zip(parts[::2], [*parts[1::2], ""], strict=False)],
            "" if row.verify.strip() == NOT_JUDGED else row.verify.strip(),
            bool(row.failure),
            bool(row.words.strip()),
        )
    return found


def read_feature_annotations(path: str | Path, judgement: int | None = None) -> dict[int, FeatureAnnotation]:
    """A table that `explain` or `judge` wrote, .parquet or .tsv, by feature; see `feature_annotations`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such table.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected a table that `explain` or `judge` wrote. Received: {str(path)!r}, which is not there."
        )
    return feature_annotations(read_annotations(path), judgement)


def write_annotations(
    rows: Sequence[AnnotationRow], path: str | Path, columns: Sequence[str] = tuple(COLUMNS)
) -> Path:
    """Write a table whole, or not at all: tab-separated, or Parquet if the name ends so.

    Tab-separated, carriage returns are left out; Parquet keeps them.
    """
    path = Path(path)
    with whole_file(path) as draft:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            names = [*columns, "Failure"]
            data = {name: [getattr(row, COLUMNS.get(name, "failure")) for row in rows] for name in names}
            pyarrow.parquet.write_table(pyarrow.table(data), draft)
        else:
            lines = ["\t".join(columns)]
            lines += [
                "\t".join(escape(str(getattr(row, COLUMNS[name])).replace("\r", "")) for name in columns)
                for row in rows
            ]
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path


def read_annotations(path: str | Path) -> list[AnnotationRow]:
    """Read a table of either form, with the columns that its first line names; of a folder its features.tsv (of
    spans) or words.tsv (of feature-table).

    Raises:
        ValueError: there is no column FeatureID or Words, or a line does not fit the first one.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        names = ("features.tsv", "words.tsv")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"Expected a folder with {names[0]}, which spans writes, or {names[1]}, which feature-table writes. "
                f"Received: {str(path)!r} with neither; give a table or such a folder."
            )
        path = found[0]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path).to_pydict()
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if not path.is_file():
                raise
            raise ValueError(f"{path} is no Parquet file: {error}") from error
        names, cells = list(table), list(zip(*table.values(), strict=True))
    else:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            names = file.readline().rstrip("\r\n").split("\t")
            cells = [[unescape(cell) for cell in line.rstrip("\n").split("\t")] for line in file if line.strip()]
    if not {"FeatureID", "Words"} <= set(names):
        raise ValueError(f"A table of features has columns FeatureID and Words. Received: {names} in {str(path)!r}.")
    known = {**COLUMNS, "Failure": "failure"}
    rows = []
    for number, row in enumerate(cells):
        if len(row) != len(names):
            raise ValueError(
                f"Row {number} of {str(path)!r} must have {len(names)} cells, {names}. Received: {len(row)} cells."
            )
        values: dict[str, Any] = {
            known[name]: "" if value is None else value
            for name, value in zip(names, row, strict=True)
            if name in known
        }
        try:
            values["feature_id"] = int(values["feature_id"])
        except (TypeError, ValueError):
            raise ValueError(
                f"FeatureID must be a number. Received: {values['feature_id']!r} in row {number} of {str(path)!r}."
            ) from None
        rows.append(AnnotationRow(**values))
    return rows


def read_unintended(path: str | Path, judgements: Sequence[int] = (0,)) -> list[int]:
    """The ids of the features in a judged table that the task does not intend; see `unintended_mask`."""
    return unintended_features(read_annotations(path), judgements)


def escape(text: str, *, returns: bool = False) -> str:
    """One line without tabs; `returns` writes carriage returns as \\r too."""
    return text.translate(str.maketrans({**ESCAPES, **(RETURN if returns else {})}))


def unescape(text: str, *, returns: bool = False) -> str:
    """What `escape` was given."""
    meant = {written: character for character, written in {**ESCAPES, **(RETURN if returns else {})}.items()}
    return re.sub(r"\\.", lambda found: meant.get(found[0], found[0]), text)
