"""What a run writes: files that are there whole or not at all, in places that one run at a time writes to.

The same in short for `save_pretrained`, which is published and imports nothing of the library, is in
`modeling/output_files.py`; the two share the lock.
"""

from __future__ import annotations

import functools
import inspect
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

P = ParamSpec("P")
R = TypeVar("R")
LOCK = ".lock"
HOLDER = "process "  # begins what a lock says; whatever else it says is filelock's own


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A draft to write, which takes the file's place when the block ends well and is gone when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}.draft")
    draft.touch(exist_ok=False)  # never one that somebody put there
    mode = draft.stat().st_mode
    try:
        yield draft
        draft.chmod(mode)  # some writers make their files private
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: str | Path | None, name: str = LOCK) -> Iterator[None]:
    """Be the only run that writes to a folder; the thread that is may enter again. Drafts that a killed run left go.

    Args:
        folder: made if it is not there. None, and addresses with `://`, are not locked.
        name: of the lock; runs that share a folder have one each.

    Raises:
        BlockingIOError: another run writes there; the message says which.
        OSError: the folder cannot be written.
    """
    if folder is None or "://" in str(folder):
        yield
        return
    folder = Path(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    _make(folder)
    try:
        with _locked(folder / name, folder):
            if name == LOCK:
                for draft in folder.glob(".*.draft"):
                    draft.unlink(missing_ok=True)
            yield
    finally:
        with suppress(OSError):  # what a run that wrote nothing has made
            for parent in made:
                parent.rmdir()


@contextmanager
def shared_folder(folder: str | Path | None, rank: int, world: int) -> Iterator[None]:
    """Be the only run of its rank that writes to a folder that several share; the only one, where it is alone."""
    with locked_folder(folder, f"{LOCK}-{rank}"), locked_folder(folder if world == 1 else None):
        yield


@contextmanager
def locked_file(path: str | Path | None) -> Iterator[None]:
    """Be the only run that writes a file, as `locked_folder`."""
    if path is None:
        yield
        return
    path = Path(path)
    _make(path.parent)
    with _locked(path.with_name(f".{path.name}{LOCK}"), path):
        yield


def writes_to(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function hold the lock of the folder that it gets under this name while it runs: see `locked_folder`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with locked_folder(signature.bind(*args, **kwargs).arguments.get(name)):
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def _locked(file: Path, what: Path) -> Iterator[None]:
    lock = FileLock(file, timeout=0, is_singleton=True)  # one object a file, which counts how often it is entered
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"One run at a time writes to {str(what)!r}. It is in use by {_holder(file)}. Wait for its end, or give "
            "another place."
        ) from None
    except OSError as error:
        raise OSError(f"{str(what)!r} cannot be written; give another. Received: {error}.") from error
    try:
        if lock.lock_counter == 1 and _holder(file).startswith(HOLDER):
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            file.write_text(f"{HOLDER}{os.getpid()} of {socket.gethostname()}, since {now}", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows deletes no file that is open
                file.unlink(missing_ok=True)
        lock.release()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The folder {str(folder)!r} cannot be written; give another. Received: {error}.") from error


def _holder(file: Path) -> str:
    """What a lock says of who has it; of a new one, which says nothing, that it is a process."""
    try:
        return " ".join(file.read_text(encoding="utf-8", errors="replace").split())[:200] or f"{HOLDER}unknown"
    except OSError:
        return f"{HOLDER}unknown"
