"""The table of docs/checkpoints.md names tests that exist, and every golden checkpoint is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_transformers.modeling.conversion import FORMATS
from tests.modeling.conversion.golden import ROOT, needs_golden, variants

CHECKOUT = Path(__file__).parents[3]
PAGE = (CHECKOUT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\w+) \| [^|]+ \| [^|]+ \| ((?:`[^`|]+` ?)+)\|$", re.M)
CELLS = [(name, cell) for name, cells in ROW.findall(PAGE) for cell in re.findall(r"`([^`]+)`", cells)]


def test_every_format_has_rows():
    assert len({name for name, _ in CELLS}) >= len(FORMATS) - 2  # two are of one file


@needs_golden
def test_every_golden_checkpoint_is_in_the_table():
    cells = set(CELLS)
    missing = [
        (name, variant)
        for name, variant in _golden()
        if not {(name, f"golden[{variant}]"), (name, f"golden_{variant}")} & cells
    ]
    assert not missing


def _golden() -> list[tuple[str, str]]:
    return [
        (folder.name, variant) for folder in ROOT.iterdir() if folder.is_dir() for variant in variants(folder.name)
    ]


@pytest.mark.slow  # pytest collects in a process of its own
def test_the_tests_exist():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", str(Path(__file__).parent)],
        capture_output=True, text=True, check=False, cwd=CHECKOUT,
    )  # fmt: skip
    collected = set(re.findall(r"test_(\w+)\.py::test_(.+)", run.stdout))
    assert collected, run.stderr
    missing = [pair for pair in CELLS if pair not in collected]
    if not ROOT.is_dir():
        missing = [pair for pair in missing if not pair[1].startswith("golden[")]
    assert not missing


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_format_is_told_of(form):
    assert form.name.replace("_", " ").casefold() in PAGE.replace("_", " ").casefold()
