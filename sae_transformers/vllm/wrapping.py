"""Functions of vLLM that have no hook of their own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

TESTED = "0.32"
_MARK = "__sae_transformers__"


def wrap(module: str, name: str, around: Callable[..., Any]) -> None:
    """Put a function around one of vLLM's; once, however often it is asked for.

    Args:
        module: where it is defined.
        name: of the function, or `Class.method`.
        around: called with the original and its arguments.

    Raises:
        ImportError: it is not there.
    """
    owner, _, last = name.rpartition(".")
    holder = found(module, owner) if owner else found(module)
    original = getattr(holder, last, None)
    if original is None:
        raise _missing(f"{module}.{name}")
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(holder, last, wrapped)


def found(module: str, name: str = "") -> Any:
    """A module of vLLM, or a name in it.

    Raises:
        ImportError: it is not there.
    """
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module) from error
    for part in filter(None, name.split(".")):
        holder = getattr(holder, part, None)
        if holder is None:
            raise _missing(f"{module}.{name}")
    return holder


def _missing(name: str) -> ImportError:
    return ImportError(
        f"Steering on vLLM stands on {name}, which vLLM {release()} does not have. Tested with {TESTED}: pip install "
        f"'sae-transformers[vllm]', or keep vLLM from loading this package with VLLM_PLUGINS=''."
    )


def release() -> str:
    """The release of vLLM that is installed."""
    return getattr(importlib.import_module("vllm"), "__version__", "of unknown version")
