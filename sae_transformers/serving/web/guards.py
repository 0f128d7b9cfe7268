"""Who may ask: requests under the server's own names, and with its key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from typing import Any

from ..errors import RequestError
from .record import refuse

WITHOUT_KEY = ("/health", "/ready")


class HostCheck:
    """Refuses what a browser sends for a page of another site.

    A page whose name is made to point at this machine (DNS rebinding) is of the same origin as the server, so that no
    rule of the browser holds it back; but its requests bear its name. So what arrives at a loopback address must be
    meant for one, or for an allowed name. With allowed names the check holds at every address.

    Args:
        allowed: names, beside `localhost` and loopback addresses.
    """

    def __init__(self, app: Any, allowed: Collection[str] = ()) -> None:
        self.app = app
        self.allowed = {"localhost", *(name.lower() for name in allowed)}
        self.everywhere = bool(allowed)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Any) -> RequestError | None:
        headers = dict(scope["headers"])
        if headers.get(b"sec-fetch-site", b"").strip().lower() == b"cross-site":
            return RequestError("Pages of other sites may not use this server.", code="cross_site", status=403)
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if host in self.allowed or _is_loopback(host):
            return None
        if not self.everywhere and not _is_loopback((scope.get("server") or ("",))[0] or ""):
            return None
        told = "The server is not known by this name; `--allowed-host` allows one."
        return RequestError(f"{told} Received: Host={host[:200]!r}.", code="host_not_allowed", status=403)


class KeyCheck:
    """Lets requests pass only with the key, but for `WITHOUT_KEY`. It is compared in constant time and never told."""

    def __init__(self, app: Any, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in WITHOUT_KEY:
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            if not hmac.compare_digest(key.strip(), self._key) or kind.lower() != b"bearer":
                told = RequestError("Give the server's key as a bearer token.", code="invalid_api_key", status=401)
                await refuse(told, scope, receive, send)
                return
        await self.app(scope, receive, send)


def host_name(header: str) -> str:
    """The name or address in a `Host` header, without its port and the brackets of IPv6."""
    header = header.strip().lower()
    name, bracket, _ = header.removeprefix("[").partition("]")
    return name if bracket and header.startswith("[") else header.partition(":")[0]


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # a name
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback  # mapped: of IPv4 at a socket of IPv6
