"""Logins in addresses, kept out of all that is written or said; and which hosts are this machine. Without torch."""

from __future__ import annotations

import ipaddress
import re

# user:password@ or user@ between `scheme://` and the host
_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/?#@\"'<>]+@", re.IGNORECASE)


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
