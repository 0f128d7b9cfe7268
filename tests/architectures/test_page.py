"""The page of architectures is what the identities give, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.architectures.families import CAUSAL, IMAGE_TEXT, families, why_not_tiny
from tests.architectures.grid import Cell
from tests.architectures.page import COLUMNS, all_yes, families_of, page, read_page
from tests.architectures.whole_grid import whole_grid, wrong_cells

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
PARTS = 6  # of each task, so that the workers share them


def test_a_page_is_read_as_it_was_written():
    rows = {
        "causal-lm.one": {column: Cell("yes") for column in COLUMNS},
        "causal-lm.two_a": {column: Cell("refused", "why | not") for column in COLUMNS} | {"full": Cell("n/a", "b")},
        "image-text-to-text.one": {column: Cell("yes", "to 1e-7") for column in COLUMNS},
    }
    release, states = read_page(page(rows, {"causal-lm.three": "too large"}, "5.23.0"))
    assert release == "5.23.0"
    assert states == {name: {column: cell.state for column, cell in row.items()} for name, row in rows.items()}


def test_the_page_shows_enough_families_and_none_that_is_wrong():
    release, rows = read_page(PAGE.read_text(encoding="utf-8"))
    assert not [name for name, row in rows.items() if "NO" in row.values()]
    assert len(families_of(rows)) >= 150
    whole = len(families_of(rows, all_yes))
    assert whole >= 130
    assert f"[{whole} families](docs/architectures.md)" in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    if release == transformers.__version__:
        can_be_had = {
            f"{task}.{n}" for task in (CAUSAL, IMAGE_TEXT) for n in families(task) if not why_not_tiny(n, task)
        }
        assert set(rows) == can_be_had


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("task", [CAUSAL, IMAGE_TEXT])
def test_no_cell_is_wrong_and_the_page_is_what_a_run_gives(task, part, tmp_path):
    rows, _ = whole_grid([(task, name) for name in families(task)[part::PARTS]], tmp_path)
    assert not wrong_cells(rows)
    release, shown = read_page(PAGE.read_text(encoding="utf-8"))
    if release == transformers.__version__:
        assert {name: {column: cell.state for column, cell in row.items()} for name, row in rows.items()} == {
            name: shown[name] for name in rows
        }
