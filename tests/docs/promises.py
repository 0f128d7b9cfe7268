"""The page of promises: its commands and Python, and the first lines that they print. `python -m tests.docs.promises`
writes those lines anew."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from sae_transformers.cli import app
from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.docs.pages import DOCS
from tests.docs.running import SHORTER
from tests.docs.world import byte_tokenizer, put, tiny_world

PAGE = DOCS / "papers" / "promises.md"
COMMAND, LINES, WIDTH = "sae-transformers ", 3, 110
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
NUMBER = re.compile(r"[-+−]?\d[\d.,:]*(?:e[-+]?\d+)?")
FENCE = re.compile(r"^```(?P<language>console|python|text)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


class Promise(NamedTuple):
    """Something that is run. line: of the page, from 0. shown: what stands behind it there."""

    line: int
    code: str
    is_command: bool
    shown: list[str]


def promises() -> list[Promise]:
    """Everything that the page runs, in order."""
    text = PAGE.read_text(encoding="utf-8")
    found: list[Promise] = []
    for fence in FENCE.finditer(text):
        first = text.count("\n", 0, fence.start("code"))
        if fence["language"] == "python":
            found.append(Promise(first, fence["code"], False, []))
        elif fence["language"] == "text":
            found[-1].shown.extend(fence["code"].splitlines())
        else:
            for number, line in enumerate(fence["code"].splitlines()):
                if line.startswith(COMMAND):
                    found.append(Promise(first + number, line, True, []))
                elif not line.startswith("# "):
                    found[-1].shown.append(line)
    return found


@contextmanager
def page_folder() -> Iterator[Path]:
    """A folder with all that the page names, and a Hub of tiny models."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch, tiny_world(Path(scratch)) as world:
        put(world.hub, EMBEDDER, Path(save_tiny_embedder(Path(scratch) / "embedder", tokenizer=byte_tokenizer())))
        folder = Path(scratch) / "here"
        shutil.copytree(world.folder, folder)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def run(one: Promise, namespace: dict[str, Any]) -> list[str]:
    """The first lines that it prints, cut to the page's width.

    Raises:
        AssertionError: a command fails.
    """
    if one.is_command:
        words = shlex.split(one.code)[1:]
        result = CliRunner().invoke(app, [*words, *SHORTER.get(words[0], "").split()])
        assert result.exit_code == 0, f"promises.md:{one.line + 1}: {one.code}\n{result.output}\n{result.exception!r}"
        printed = result.stdout
    else:
        with redirect_stdout(StringIO()) as written:
            exec(compile("\n" * one.line + one.code, str(PAGE), "exec", dont_inherit=True), namespace)  # noqa: S102
        printed = written.getvalue()
    lines = [" ".join(line.split()) for line in printed.splitlines() if re.search(r"\w", line)]
    lines = [line for line in lines if not line.startswith("{")]  # what a trainer logs
    return [line if len(line) <= WIDTH else line[:WIDTH].rstrip() + "…" for line in lines[:LINES]]


def alike(lines: list[str], others: list[str]) -> bool:
    """Whether the lines are the same but for their numbers; of those that were cut, as far as both go."""
    return len(lines) == len(others) and all(_alike(*pair) for pair in zip(lines, others, strict=True))


def _alike(line: str, other: str) -> bool:
    forms = [NUMBER.sub("0", text.split("…")[0]) for text in (line, other)]
    if "…" in line or "…" in other:
        shorter, longer = sorted(forms, key=len)
        return longer.startswith(shorter[:-1])  # its last character may be the first half of a number
    return forms[0] == forms[1]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8").splitlines()
    namespace: dict[str, Any] = {"__name__": "promises"}
    with page_folder():
        found = [(one, run(one, namespace)) for one in promises()]
    for one, lines in reversed(found):
        start = one.line + 1
        if not one.is_command:
            start = text.index("```text", one.line) + 1
        text[start : start + len(one.shown)] = lines
    PAGE.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
