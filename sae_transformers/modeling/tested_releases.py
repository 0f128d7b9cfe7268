"""Which releases of transformers this code was tested with. It looks inside `generate` and the bases' forward passes,
which have changed their words between minor releases before."""

from __future__ import annotations

import functools
import warnings

import transformers

OLDEST, NEWEST = "5.12.0", "5.24.0"


def untested(installed: str) -> bool:
    """Whether a release is of a later minor than the newest one that was tested, or earlier than the oldest."""
    minor = _minor(installed)
    return minor > _minor(NEWEST) or minor < _minor(OLDEST)


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


@functools.cache
def warn_if_untested() -> None:
    """Warns, once a process, of a release of transformers that was not tested."""
    if untested(transformers.__version__):
        warnings.warn(
            f"sae_transformers was tested with transformers {OLDEST} to {NEWEST}; this is {transformers.__version__}. "
            f"`model.check()` compares steering on your own base in seconds, or `pip install "
            f"'transformers<={NEWEST}'`.",
            stacklevel=4,
        )
