"""From an application to a listening process: a port that is free, a key from the environment, an orderly end."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import uvicorn

GRACE_S = 3  # for connections at the end; answers under way are ended at once


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening. Port 0 takes a free one.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
        ValueError: no such port.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"The port must be from 0 to 65535. Received: {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"No such address: {host!r} ({error}).") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"Port {port} of {host} is in use. Give another, or 0 for any that is free.") from error
        raise OSError(f"Cannot listen at {host} port {port}: {error.strerror}.") from error
    return bound


def key_from(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is named.

    Raises:
        ValueError: the variable is not set, or holds no usable key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"The environment variable {variable} must hold a key: one word of ASCII.")
    return key


class Listener(uvicorn.Server):
    """A server whose answers end at the first Ctrl-C."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        engine = getattr(getattr(self.config.app, "state", None), "engine", None)
        if engine is not None:
            engine.stop_soon()
        super().handle_exit(sig, frame)


def listener(app: Any, log_level: str = "warning") -> Listener:
    """A server to `run(sockets=[...])`. Its log holds addresses and paths, no bodies and no headers."""
    return Listener(
        uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=GRACE_S, lifespan="on", ws="none")
    )
