"""Commands in the README and the docs exist, with the options they are shown with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from sae_transformers.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FREE = {"train"}  # takes every setting as an option


def commands(text: str) -> list[str]:
    """Lines of code blocks that call the command line, continued lines joined."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("sae-transformers ")]


def options_of(verb: str) -> set[str]:
    known = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert verb in known, f"there is no verb {verb!r}"
    return {name for parameter in known[verb].params for name in [*parameter.opts, *parameter.secondary_opts]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        _, verb, *words = shlex.split(line, comments=True)
        known = options_of(verb)
        shown = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert verb in FREE or not shown - known, f"{line}: no option {sorted(shown - known)}"


def test_a_wrong_command_is_found() -> None:
    text = "```bash\nsae-transformers spans M \\\n    --nothing 3  # --comment\nls\n```"
    (line,) = commands(text)
    assert "--nothing" in line and "--nothing" not in options_of("spans")
    assert any(commands(page.read_text(encoding="utf-8")) for page in PAGES[1:])
