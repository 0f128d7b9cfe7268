"""Files that are written whole or not at all, in folders that one run at a time writes to.

`latents/output_files.py` is the same for the rest of the library, which this folder, published as it is, does not
import.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft to write, which takes the file's place when the block ends well and is gone when it does not."""
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}.draft")
    draft.touch(exist_ok=False)  # never one that somebody put there
    mode = draft.stat().st_mode
    try:
        yield draft
        draft.chmod(mode)  # safetensors makes its files private
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def check_writable(folder: str | os.PathLike) -> None:
    """Make a folder and see that files can be made in it.

    Raises:
        OSError: they cannot.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"The output folder cannot be written; give another. Received: {str(folder)!r} ({error})."
        ) from error


@contextmanager
def locked_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Be the only run that writes to a folder; the thread that is may enter again. Drafts that a killed run left go.

    Raises:
        BlockingIOError: another run writes there.
        OSError: the folder cannot be written.
    """
    check_writable(folder)
    file = Path(folder) / LOCK
    lock = FileLock(file, timeout=0, is_singleton=True)  # one object a file, which counts how often it is entered
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"One run at a time writes to {str(folder)!r}. It is in use by another; wait for its end, or give another "
            "folder."
        ) from None
    try:
        if lock.lock_counter == 1:
            for draft in Path(folder).glob(".*.draft"):  # of a run that was killed
                draft.unlink(missing_ok=True)
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows deletes no file that is open
                file.unlink(missing_ok=True)
        lock.release()
