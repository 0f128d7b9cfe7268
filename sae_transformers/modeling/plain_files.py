"""Files of strangers, read no further than they may be long, and safetensors with errors that say which file.

A folder or repository may hold a pipe, which nobody writes to, or a link to a device, which never ends and has size 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 2**24
# Of safetensors: about 100 bytes a tensor, and several times that in memory.
MAX_HEADER_BYTES = 2**23


def check_plain(path: str | os.PathLike) -> Path:
    """The path again, of a file that ends, or of a link to one.

    Raises:
        ValueError: it is a pipe, a device or the like.
        OSError: it is not there, or a folder.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"Expected a file. Received: {str(path)!r}, which is a folder.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"Expected a plain file. Received: {str(path)!r}, which is a pipe, a device or the like.")
    return path


def read_plain(path: str | os.PathLike, *, most: int = MAX_JSON_BYTES) -> bytes:
    """All of a plain file.

    Raises:
        ValueError: it is no plain file, or longer than `most` bytes.
        OSError: it is not there, or cannot be read.
    """
    with check_plain(path).open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"{path} is longer than such a file can be: expected at most {most:,} bytes.")
    return found


def read_json(path: str | os.PathLike, *, most: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no plain file, longer than `most` bytes, or no JSON.
        OSError: it is not there, or cannot be read.
    """
    text = read_plain(path, most=most)
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Download or save it again.") from error


@contextlib.contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Errors of damaged files, as ValueErrors that say which."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name} is damaged or cut short: {error}. Download or save it again.") from error


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Whatever comes of values that nobody checked, with the name of what is being loaded."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{name} cannot be loaded: {error}") from error
    except (LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{name} cannot be loaded: {error!r}") from error


@contextlib.contextmanager
def opened_tensors(path: str | os.PathLike) -> Iterator[Any]:
    """A safetensors file as `safe_open` gives it.

    Raises:
        ValueError: it is no plain file, damaged, or has an unlikely header.
        OSError: it is not there, or cannot be read.
    """
    check_plain(path)
    check_header(path)
    with plain_errors(str(path)), safe_open(path, framework="pt") as stored:
        yield stored


def check_header(path: str | os.PathLike) -> int:
    """Length of a safetensors file's header, in bytes.

    Raises:
        ValueError: it is longer than the file or than any header.
    """
    with Path(path).open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{path} is damaged or cut short: its header would have {length:,} bytes, of at most "
            f"{max(0, min(size - 8, MAX_HEADER_BYTES)):,}. Download or save it again."
        )
    return length


@contextlib.contextmanager
def written_tensors(name: str | os.PathLike) -> Iterator[None]:
    """Errors of safetensors that cannot be written, as on a full disk, as OSErrors that say which.

    What was written of a file goes: safetensors before 0.8 leaves it at its place, cut short.

    Args:
        name: a file, or a folder of them.
    """
    before = _times_of_change(name)
    try:
        yield
    except SafetensorError as error:
        for path, changed in _times_of_change(name).items():
            if before.get(path) != changed and _is_cut_short(path):
                path.unlink(missing_ok=True)
        raise OSError(f"{os.fspath(name)} cannot be written: {error}.") from error


def _times_of_change(name: str | os.PathLike) -> dict[Path, int]:
    """The safetensors files at a path or in a folder -> when each was changed, in nanoseconds."""
    path = Path(name)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def _is_cut_short(path: Path) -> bool:
    try:
        with opened_tensors(path):
            return False
    except ValueError:
        return True
