"""The code blocks of the documentation, in order, with the reason where one is not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
SHELL_MARKS = re.compile(r"\s(?:&&|\|\||[|;<>&])\s|\s&$")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        page: relative to the repository.
        line: of the page, where the code begins, from 1.
        language: python, bash, ... or empty.
        code: without the fence.
        reason: why the tests do not run it; empty where they do.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Words of each call of `sae-transformers`, continued lines joined; pipes to other programs are cut off."""
        if self.language not in ("bash", "console", ""):
            return []
        lines = self.code.replace("\\\n", " ").splitlines()
        return [
            shlex.split(SHELL_MARKS.split(line)[0], comments=True)[1:]
            for line in lines
            if line.startswith("sae-transformers ")
        ]


def blocks(page: Path) -> list[Block]:
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    return [
        Block(
            name, text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["reason"] or ""
        )
        for found in BLOCK.finditer(text)
    ]
