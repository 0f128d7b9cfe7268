"""Names from data in a first card: as YAML, Markdown and Python that show them and mean nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[\w.-]{1,96})?", re.ASCII)
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")  # of YAML
_MARKS = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore inside a word has no meaning


def hub_id(name: str | None) -> str | None:
    """A name that may be a repository's of the Hub; None for others, which a card does not name."""
    return name if name and _HUB_ID.fullmatch(name) else None


def base_line(name: str | None, *, adapter: bool = False) -> str:
    """The lines of a card's metadata that name the base, and as what the repository is listed on the base's page;
    empty without one."""
    if name is None:
        return ""
    plain = "/" in name or (name[0].isalpha() and name.lower() not in _WORDS)
    relation = "base_model_relation: adapter\n" if adapter else ""
    return (f"base_model: {name}\n" if plain else f"base_model: '{name}'\n") + relation


def one_line(text: Any) -> str:
    """A text without line breaks, control characters and marks of direction."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def markdown(text: Any) -> str:
    """A text that Markdown and HTML leave as it is, in a heading, a paragraph or a cell of a table."""
    shown = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\1", shown)


def code(text: Any) -> str:
    """A text in code style; as Markdown where it holds what ends that."""
    shown = one_line(text)
    return markdown(shown) if "`" in shown or "|" in shown or not shown else f"`{shown}`"


def quoted(text: Any) -> str:
    """A text between the quotes of a literal of Python, on one line."""
    return json.dumps(one_line(text), ensure_ascii=False)[1:-1]
