"""Texts from elsewhere, made safe where they are said or written: no logins, no codes of a terminal, no formulas.

No torch is imported here: the command line uses it.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

# user:password@ or user@ between `scheme://` and the host
_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/?#@\"'<>]+@", re.IGNORECASE)
# What a terminal obeys or hides: control characters but line break and tab, marks of direction, halves of characters.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def without_logins(text: str) -> str:
    """A text in which every address has lost its `user:password@`."""
    return _LOGIN.sub(r"\g<scheme>", text)


def is_loopback(host: str | None) -> bool:
    """Whether a host of an address is this machine, so that nothing sent to it leaves: a name is not asked for."""
    if host is None or host == "localhost":
        return host is not None
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def visible(text: str) -> str:
    """A text for a terminal: what it would obey stands there as Python writes it, such as `\\x1b`."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def to_cell(value: Any) -> Any:
    """A value for a CSV file. A text that a spreadsheet would run as a formula gets an apostrophe before it.

    That is one which begins with = + - @, a tab or a line break, after apostrophes or none, and is no number. Numbers
    stay as they are; `from_cell` takes the apostrophe off.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value):
        return "'" + value
    return value


def from_cell(cell: str) -> str:
    """The text that `to_cell` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) and not _is_number(cell[1:]) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and text.strip() == text
