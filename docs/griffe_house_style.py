"""Docstrings of this library, as griffe reads Google's style.

Three habits of ours are not Google's: one line for parameters that share a text (`low, high: ends of the interval.`),
the fields of a class as a paragraph of `name: text` in its docstring, without a heading, and code, formulas or lists
in aligned columns that are not indented (ruff takes the indentation away). These are shown as they stand.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\s*)(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")
SECTION = re.compile(r"^(Args|Attributes):$")
ANY_SECTION = re.compile(r"^[A-Z][A-Za-z ]+:\n")
COLUMNS = re.compile(r"\S {2,}\S")


class HouseStyle(griffe.Extension):
    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        rewrite(mod)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        rewrite(func)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        rewrite(cls)


def rewrite(of: griffe.Object) -> None:
    if of.docstring is not None:
        fields = {name for name, one in of.members.items() if one.is_attribute} if of.is_class else set()
        of.docstring.value = one_name_a_line(with_heading(with_columns(of.docstring.value), fields))


def with_heading(text: str, fields: set[str]) -> str:
    """Paragraphs of `field: text` become sections."""
    paragraphs = re.split(r"\n{2,}", text)
    for number, paragraph in enumerate(paragraphs):
        found = ITEM.match(paragraph.split("\n", 1)[0])
        if found and not found[1] and set(found[2].split(", ")) <= fields:
            body = "\n".join(f"    {line}" for line in paragraph.split("\n"))
            paragraphs[number] = f"Attributes:\n{continued(body)}"
    return "\n\n".join(paragraphs)


def is_code(paragraph: str) -> bool:
    """Whether it is Python that calls something; prose is not."""
    try:
        return any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(paragraph)))
    except SyntaxError:
        return False


def with_columns(text: str) -> str:
    """Paragraphs in aligned columns, or of Python, become code."""
    paragraphs = text.split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        lines = paragraph.split("\n")
        aligned = sum(bool(COLUMNS.search(line)) for line in lines) >= 2
        if paragraph.startswith(" ") or ANY_SECTION.match(paragraph):
            continue
        if aligned or is_code(paragraph):
            paragraphs[number] = "\n".join(f"    {line}" for line in lines)
    return "\n\n".join(paragraphs)


def continued(body: str) -> str:
    """Lines that go on with an item are indented below it."""
    return "\n".join(line if ITEM.match(line) else f"    {line}" for line in body.split("\n"))


def one_name_a_line(text: str) -> str:
    """`a, b: text` in a section becomes two items."""
    lines, inside = [], False
    items: list[list[str]] = []
    for line in text.split("\n"):
        if SECTION.match(line):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        found = ITEM.match(line) if inside else None
        if found and found[1] == "    ":
            items = [[f"    {name}: {found[3]}"] for name in found[2].split(", ")]
            lines.append(items)
        elif inside and items and line.startswith("     "):
            for item in items:
                item.append(line)
        else:
            items = []
            lines.append(line)
    return "\n".join("\n".join("\n".join(one) for one in line) if isinstance(line, list) else line for line in lines)
