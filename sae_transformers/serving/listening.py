"""From an application to a listening process: a port that is free, a key from the environment, an orderly end."""

from __future__ import annotations

import copy
import errno
import os
import signal
import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from .web.connections import LimitedConnection
from .web.record import Traffic

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
    """A server whose answers end at the first Ctrl-C, and have some time to end after SIGTERM.

    Until then it takes no more requests, which `/ready` says too; a second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, state: Any) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: Any) -> None:
        traffic: Traffic = self._state.traffic
        if sig != signal.SIGTERM or traffic.draining or not self._state.limits.drain_s:
            self._end(sig, frame)
            return
        traffic.draining = True
        threading.Thread(target=self._drain, args=(sig, frame), name="draining", daemon=True).start()

    def _drain(self, sig: int, frame: Any) -> None:
        deadline = time.monotonic() + self._state.limits.drain_s
        while self._state.traffic.at_work and time.monotonic() < deadline and not self.should_exit:
            time.sleep(0.02)
        if not self.should_exit:
            self._end(sig, frame)

    def _end(self, sig: int, frame: Any) -> None:
        self._state.traffic.draining = True
        self._state.engine.stop_soon()
        super().handle_exit(sig, frame)


def listener(app: FastAPI, log_level: str = "warning") -> Listener:
    """A server to `run(sockets=[...])`, of an application of `build_app`.

    At the level info its log has a line for each request, which holds no text and no header.
    """
    limited = type("Limited", (LimitedConnection,), {"limits": app.state.limits})
    config = uvicorn.Config(
        app, http=limited, log_config=log_config(log_level), log_level=log_level, access_log=False, lifespan="on",
        timeout_graceful_shutdown=GRACE_S, ws="none",
    )  # fmt: skip
    made = Listener(config, app.state)
    app.state.traffic.connections = lambda: len(made.server_state.connections)
    return made


def log_config(log_level: str) -> dict[str, Any]:
    """uvicorn's own settings of the log, for this package's server too."""
    settings = copy.deepcopy(LOGGING_CONFIG)
    level = log_level.upper()
    settings["loggers"]["sae_transformers.serving"] = {"handlers": ["default"], "level": level, "propagate": False}
    return settings
