"""Two runs of a verb on one `--out`: the second is refused at once, and nothing of the first is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sae_transformers.cli import app
from sae_transformers.latents.output_files import locked_file, locked_folder

FILES = {"annotate", "ask-features", "concept-data", "dashboard", "detect", "explain", "features", "generate", "judge"}
FILES |= {"steer-feature"}
# These refuse it themselves, as they share a folder between processes, take it from a recipe, or write beside what is
# there: see their tests.
OWN = {"attach", "card", "harvest", "spans", "train"}


def writers() -> list[str]:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(name for name, one in commands.items() if any(p.name == "out" for p in one.params))


def words(verb: str, out: Path) -> list[str]:
    """The least that a verb takes, of things that are not there."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    needed = [p for p in commands[verb].params if p.required and p.name != "out"]
    found = [verb]
    for one in needed:
        found += ["0"] if one.param_type_name == "argument" else [one.opts[0], "0"]
    out_option = next(p for p in commands[verb].params if p.name == "out")
    return [*found, str(out)] if out_option.param_type_name == "argument" else [*found, "--out", str(out)]


@pytest.mark.parametrize("verb", [name for name in writers() if name not in OWN])
def test_the_second_run_is_refused_at_once(verb: str, tmp_path: Path) -> None:
    out = tmp_path / ("table.jsonl" if verb in FILES else "folder")
    given = words(verb, out)
    with (locked_file if verb in FILES else locked_folder)(out), ThreadPoolExecutor(1) as threads:
        result = threads.submit(lambda: CliRunner().invoke(app, given)).result()
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: One run at a time writes to") and out.name in result.stderr
    assert list(tmp_path.iterdir()) == []
