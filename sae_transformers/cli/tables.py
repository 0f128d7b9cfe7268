"""Rows as tables, and progress as a bar: how the verbs show results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def open_console(width: int | None = None) -> Console:
    """What the verbs print to: no colours of its own, no line cut."""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, width=width)


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and what a workflow reports to: (done, total)."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield report


def notice_on(console: Console) -> Callable[[str], None]:
    """What a workflow tells before its long part: a line each."""
    return lambda line: console.print(line, markup=False)


def show_rows(console: Any, rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """A table with a column for each key; texts as they are, a dash for None."""
    from rich.table import Table

    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(
            *(
                f"{value:.4g}"
                if isinstance(value, float)
                else repr(value)[1:-1]
                if isinstance(value, str)
                else "-"
                if value is None
                else str(value)
                for value in row.values()
            )
        )
    console.print(table, markup=False)
