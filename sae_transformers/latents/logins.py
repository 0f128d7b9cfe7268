"""Logins in addresses, kept out of all that is written or said. No torch is imported here."""

from __future__ import annotations

import re

# user:password@ or user@ between `scheme://` and the host
_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/?#@\"'<>]+@", re.IGNORECASE)


def without_logins(text: str) -> str:
    """A text in which every address has lost its `user:password@`."""
    return _LOGIN.sub(r"\g<scheme>", text)
