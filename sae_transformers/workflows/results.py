"""What results have in common: rows for a table, a summary in lines, and how they are shown and written."""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..create_training_data.harvest.store import Store
from ..latents.output_files import whole_file, writes_to
from ..latents.progress import Count as Count
from ..latents.progress import Progress as Progress
from ..latents.safe_texts import to_cell

if TYPE_CHECKING:
    from pandas import DataFrame


class Result:
    """What a verb found: numbers as rows, what to know of them in lines, and both in a notebook."""

    def rows(self) -> list[dict[str, Any]]:
        """What was found, a mapping of column to value each."""
        return []

    def table(self) -> Sequence[Mapping[str, Any]]:
        """The rows as they are shown."""
        return self.rows()

    def summary(self) -> list[str]:
        """What the table does not say, in lines."""
        return []

    def to_frame(self) -> DataFrame:
        """`rows()` as a pandas DataFrame."""
        return to_frame(self.rows())

    def _repr_html_(self) -> str:
        lines, rows = "<br>".join(map(html.escape, self.summary())), self.table()
        return (f"<p>{lines}</p>" if lines else "") + (html_table(rows) if rows or not lines else "")


def to_frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Rows as a pandas DataFrame."""
    from pandas import DataFrame  # comes with datasets

    return DataFrame(list(rows))


def save_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a table, whole or not at all; NaN and None are empty, and no text is a formula (`to_cell`)."""
    with whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(map(to_cell, rows[0])) if rows else [])
        table.writeheader()
        table.writerows({to_cell(name): to_cell(_cell(value)) for name, value in row.items()} for row in rows)


@writes_to("folder")
def save_json(folder: str | Path, values: Mapping[str, Any]) -> list[Path]:
    """Write a JSON file for each name, whole or not at all; the files."""
    store = Store(folder)
    for name, value in values.items():
        store.write_json(name, value)
    return [Path(folder) / name for name in values]


def html_table(rows: Sequence[Mapping[str, Any]], limit: int = 20) -> str:
    """A table for a notebook; no more than `limit` rows."""
    if not rows:
        return "<em>no rows</em>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows[:limit]
    )
    more = f"<p>{len(rows) - limit:,} more</p>" if len(rows) > limit else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, float) and value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
