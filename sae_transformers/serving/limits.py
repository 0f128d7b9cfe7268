"""What clients are given. No torch is imported here: the command line uses it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..latents.settings import check_integers, check_numbers


@dataclass(frozen=True)
class ServeLimits:
    """What clients of a server are given.

    Args:
        allowed_host: name under which the server may be asked, beside localhost and loopback addresses. Repeatable.
        receive_s: seconds for the head of a request, again for its body, and to take a part of an answer.
        max_connections: open at once; more are told to come back.
        blocked_after_s: seconds of one forward pass, or of reading one request, after which `/ready` says no.
        cache_gib: GiB for the keys and values of all answers; by default four fifths of what is free at the start.
        drain_s: seconds that answers under way have to end after SIGTERM.
    """

    PANEL: ClassVar[str] = "Limits"

    allowed_host: tuple[str, ...] | None = None
    receive_s: float = 30.0
    max_connections: int = 512
    blocked_after_s: float = 30.0
    cache_gib: float | None = None
    drain_s: float = 25.0

    def __post_init__(self) -> None:
        check_integers(self, max_connections=1)
        check_numbers(self, "receive_s", "blocked_after_s", "cache_gib", above=0)
        check_numbers(self, "drain_s", least=0)
        for name in self.allowed_host or ():
            if not name or not name.isascii() or any(sign in name for sign in "/:@[] \t\n"):
                raise ValueError(
                    "`allowed_host` must be a name or an IPv4 address, without a scheme and a port. "
                    f"Received: allowed_host={name!r}."
                )
