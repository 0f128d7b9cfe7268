"""`python -m tests.architectures PAGE [FAMILY ...]`: fill the grid and write it as a page of the documentation."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import transformers

from tests.architectures.families import CAUSAL, IMAGE_TEXT, families
from tests.architectures.page import page
from tests.architectures.whole_grid import whole_grid, wrong_cells


def main(target: Path, only: list[str]) -> int:
    """Fill all rows, or those of some families, and write the page; 1 where a cell says NO."""
    wanted = [(task, name) for task in (CAUSAL, IMAGE_TEXT) for name in families(task) if not only or name in only]
    with tempfile.TemporaryDirectory() as folder:
        rows, left_out = whole_grid(wanted, Path(folder), report=True)
    target.write_text(page(rows, left_out, transformers.__version__), encoding="utf-8")
    wrong = wrong_cells(rows)
    print("\n".join([f"{len(rows)} families, {len(wrong)} cells wrong", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
