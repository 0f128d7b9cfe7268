"""`python -m tests.architectures PAGE`: fill the grid over every family and write it as a page."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import transformers

from tests.architectures.families import CAUSAL, IMAGE_TEXT, families, why_not_tiny
from tests.architectures.grid import Cell, grid_row, loaded_without_the_library
from tests.architectures.page import page


def main(target: Path, only: list[str]) -> int:
    """Fill all rows, or those of some families, and write the page; 1 where a cell says NO."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: dict[str, dict[str, Cell]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in (CAUSAL, IMAGE_TEXT):
            for model_type in families(task):
                name, start = f"{task}.{model_type}", time.perf_counter()
                if only and model_type not in only:
                    continue
                if reason := why_not_tiny(model_type, task):
                    left_out[name] = reason
                    continue
                place = Path(folder) / "models" / name
                place.mkdir(parents=True)
                rows[name] = grid_row(model_type, task, place)
                wrong = {column: cell.note for column, cell in rows[name].items() if cell.state == "NO"}
                print(f"{name} {time.perf_counter() - start:.1f} s {wrong or ''}", flush=True)
        loaded_without_the_library(rows, Path(folder) / "models")
    target.write_text(page(rows, left_out, transformers.__version__), encoding="utf-8")
    cells = [(f"{name} {column}", cell) for name, row in rows.items() for column, cell in row.items()]
    wrong = [f"{place}: {cell.note}" for place, cell in cells if cell.state == "NO"]
    print("\n".join([f"{len(rows)} families, {len(wrong)} cells wrong", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
