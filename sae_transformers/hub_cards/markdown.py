"""Texts from data as Markdown that shows them and nothing else, and the templates of the cards.

A feature's name, a sample or a file's name may hold anything: a line break, a bar, three dashes, a tag, a backtick.
Each filter gives one line in which none of these has a meaning.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
_MARKS = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore inside a word has no meaning
# An absolute path, of Unix or Windows, as a word of a command or inside a text.
PATH = re.compile(r"(?<![\w.:/\\~-])(?:/(?:[\w.+@~-]+/)+[\w.+@~-]*|[A-Za-z]:\\[\w.+@\\~-]+)")


def one_line(text: Any, limit: int | None = None) -> str:
    """A text without line breaks and control characters, cut to `limit` characters."""
    plain = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in str(text))
    plain = " ".join(plain.split())
    if limit is not None and len(plain) > limit:
        return plain[: limit - 1].rstrip() + "…"
    return plain


def plain(text: Any, limit: int | None = None) -> str:
    """A text that Markdown and HTML leave as it is, in a paragraph, a list or a cell of a table."""
    shown = one_line(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = _MARKS.sub(r"\\\1", shown)
    shown = re.sub(r"^([-+=#])(?=[-+=#\s]|$)", r"\\\1", shown)  # a list, a heading, a rule
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", shown)  # a numbered list


def code(text: Any, limit: int | None = None) -> str:
    """A text in code style, in a paragraph or a list."""
    shown = one_line(text, limit)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown[:1] in ("`", "") or shown[-1:] == "`" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def code_cell(text: Any, limit: int | None = None) -> str:
    """`code` in a cell of a table, where a bar ends the cell even in code."""
    return code(text, limit).replace("|", "\\|")


def block(text: Any) -> str:
    """Lines of a code block, whose fence they cannot close: `fence` gives one that is long enough."""
    return "\n".join(_visible(line) for line in str(text).splitlines())


def _visible(line: str) -> str:
    """A line without control characters; its indent stays."""
    return "".join(c for c in line if c == "\t" or unicodedata.category(c) not in ("Cc", "Cf")).rstrip()


def fence(text: Any) -> str:
    """A fence longer than any run of backticks in a text."""
    longest = max((len(run) for run in re.findall("`+", str(text))), default=0)
    return "`" * max(3, longest + 1)


def prose(text: Any) -> str:
    """An author's own words: paragraphs and lists stay, HTML and headings do not."""
    lines = []
    for line in str(text).strip().splitlines():
        line = _visible(line).replace("&", "&amp;").replace("<", "&lt;")
        lines.append(re.sub(r"^(\s*)(#|---|===|```|~~~|\|)", r"\1\\\2", line))
    return "\n".join(lines)


def python(text: Any) -> str:
    """A text as a literal of Python, on one line."""
    return json.dumps(str(text), ensure_ascii=not str(text).isprintable())


def number(value: float | int | None, digits: int = 4) -> str:
    """`digits` significant digits, thousands with commas; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.{digits}g}"


def without_folders(command: str) -> str:
    """A command whose absolute paths are cut to their last part: folders of one machine say nothing on another."""
    return PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1] or found[0], command)


def render(template: str, context: Mapping[str, Any]) -> str:
    """A template of this folder with its values; one empty line between blocks, one line break at the end."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown: the filters below escape
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (plain, code, code_cell, block, fence, prose, python, number, one_line)
    environment.filters.update({each.__name__: each for each in filters})
    text = environment.get_template(template).render(**context)
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
