"""Rows as tables, and progress as a bar: how the verbs show results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..workflows.settings.llm import visible
from .errors import fail

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def open_console(width: int | None = None) -> Console:
    """What the verbs print to: texts as they are but for codes of a terminal, no colours of its own, no line cut."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)
    console.render_str = lambda text, **options: Console.render_str(console, visible(text), **options)
    return console


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and what a workflow reports to: (done, total)."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield report


def show_lines(console: Console, lines: Iterable[str]) -> None:
    """A line each."""
    for line in lines:
        console.print(line)


def show_rows(console: Any, rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """A table with a column for each key; texts as they are, a dash for None."""
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)


def show_saved(console: Any, found: Any, out: Path | None) -> None:
    """Save a result where a file was asked for, and say so."""
    if out is not None:
        found.save(out)
        console.print(f"{out}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else repr(value)[1:-1] if isinstance(value, str) else str(value)


def show_asked(result: Any, out: Path) -> None:
    """What came of asking a language model: saved and summed up; nothing where nothing was asked."""
    if not result.asked:
        return
    files, console = result.save(out), open_console()
    show_lines(console, [*result.summary(), " ".join(map(str, files))])
    if failure := result.failure():
        fail(failure, code=1)


@contextmanager
def suite_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each suite, and what the evaluation reports to: (suite, done, total)."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def report(suite: str, done: int, total: int | None) -> None:
        if suite not in bars:
            for bar in bars.values():
                bar.close()
            bars[suite] = tqdm(desc=suite, total=total, disable=None)
        bars[suite].update(done - bars[suite].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def show_suite(console: Any, result: Any, suite: Any, picture: Path | None = None) -> None:
    """A suite's rows, its notes, and where its picture is."""
    from rich.table import Table

    rows = suite.rows(result)
    table = Table(title=f"{result.name} ({result.seconds:,.0f} s)")
    for number, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, overflow="fold", justify="left" if number < 2 else "right", no_wrap=number >= 2)
    previous = ""
    for row in rows:
        first, *rest = row.values()
        table.add_row("" if first == previous else str(first), *map(str, rest))
        previous = first
    console.print(table)
    for note in result.notes:
        console.print(f"- {note}")
    if picture is not None:
        missing = "No plot: matplotlib is not installed (sae-transformers[plots])."
        console.print(str(suite.plot(result, picture) or missing))
