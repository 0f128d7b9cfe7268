"""The grid of identities over many families, loading included: in one process, and one interpreter beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import transformers

from tests.architectures.families import why_not_tiny
from tests.architectures.grid import ROUNDING, TOLERANCE, Cell, grid_row
from tests.invariants.published import clean_environment, run_script

Rows = dict[str, dict[str, Cell]]


def whole_grid(wanted: Iterable[tuple[str, str]], folder: Path, report: bool = False) -> tuple[Rows, dict[str, str]]:
    """Every column of the grid.

    Args:
        wanted: pairs of a task and a model type.
        folder: receives the models that are to be loaded again.
        report: print each family and its time.

    Returns:
        `task.model_type` -> column -> cell, and `task.model_type` -> why it has no row.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: Rows = {}
    left_out: dict[str, str] = {}
    for task, model_type in wanted:
        name, start = f"{task}.{model_type}", time.perf_counter()
        if reason := why_not_tiny(model_type, task):
            left_out[name] = reason
            continue
        place = folder / "models" / name
        place.mkdir(parents=True)
        rows[name] = grid_row(model_type, task, place)
        if report:
            print(f"{name} {time.perf_counter() - start:.1f} s {wrong_cells({name: rows[name]}) or ''}", flush=True)
    _load_without_the_library(rows, folder / "models")
    return rows, left_out


def wrong_cells(rows: Rows) -> list[str]:
    """The cells that are silently wrong, or fail where the base does not."""
    cells = [(f"{name} {column}", cell) for name, row in rows.items() for column, cell in row.items()]
    return [f"{place}: {cell.note}" for place, cell in cells if cell.state == "NO"]


def _load_without_the_library(rows: Rows, folder: Path) -> None:
    """Fill `adapter` and `full` of all rows, from one run of another interpreter over what they saved."""
    said = run_script("load_families.py", folder, folder=folder, env=clean_environment(folder.parent), timeout=3600)
    found = json.loads(said[said.index("FOUND ") + 6 :].splitlines()[0])
    for name, row in rows.items():
        for column in ("adapter", "full"):
            if row[column].state == "yes":
                row[column] = _loaded(found.get(name, {}).get(column), row[column].note)


def _loaded(seen: str | None, alone: str) -> Cell:
    if seen is None or not seen.startswith("["):
        return Cell("NO", seen or "not saved")
    idle, steered = json.loads(seen)
    if max(idle, steered) > TOLERANCE or not alone and idle > ROUNDING:
        return Cell("n/a" if alone else "NO", alone or f"{idle:.1e}, steered {steered:.1e}")
    return Cell("yes", f"to {idle:.0e}" if idle else "")
