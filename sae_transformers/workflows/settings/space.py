"""Settings of `space`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpaceSettings:
    """What a Space shows.

    Args:
        revision: commit of the model; by default the one that is there now.
        title: title of the page.
        licence: licence of the Space, as the Hub names it.
    """

    revision: str | None = None
    title: str | None = None
    licence: str | None = None
