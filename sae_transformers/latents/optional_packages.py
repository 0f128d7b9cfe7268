"""Packages that only some work needs: where one is not installed, the message says how to get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(what: str, package: str, extra: str) -> Iterator[None]:
    """Stands around an import.

    Args:
        what: needs the package, such as `A linear probe`.
        package: as pip names it.
        extra: of sae-transformers, which installs it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {package}, which is not installed: pip install 'sae-transformers[{extra}]'"
        ) from error
