"""Rows of JSON from files of others: one at a time, whatever their number, each with its place for an error."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_ROW = 2**24  # bytes of one row; a decoder row of 16,384 numbers has a few hundred thousand
LONGEST_OBJECT = 2**28  # bytes of a file that is one object, which is read whole
PART = 2**20
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)
Row = tuple[str, dict[str, Any]]  # the place, for a message; the row


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a .jsonl file or of a .json file that holds a list of them, or one; with .gz or without.

    Raises:
        ValueError: a row is no object of JSON, or too long; the message names file and row.
        OSError: the file cannot be read.
    """
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            lines = ".jsonl" in path.suffixes
            if lines:
                yield from _lines(file, path)  # pyright: ignore[reportArgumentType]
                return
            with io.TextIOWrapper(file, encoding="utf-8", errors="replace") as text:  # pyright: ignore[reportArgumentType]
                yield from _list(text, path)
    except BROKEN as error:
        raise ValueError(f"{path} is cut short or damaged: {error}. Fetch it again.") from error


def parsed(text: str | bytes, where: str) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be an object of JSON. Received: {text[:80]!r} ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object of JSON. Received: {text[:80]!r}.")
    return value


def _lines(file: BinaryIO, path: Path) -> Iterator[Row]:
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        where = f"{path}, row {number}"
        if len(line) > LONGEST_ROW:
            raise ValueError(f"{where} must have at most {LONGEST_ROW:,} bytes. Received: more.")
        if line.strip():
            yield where, parsed(line, where)


def _list(reader: io.TextIOWrapper, path: Path) -> Iterator[Row]:
    """The objects of one list, decoded as they come; or the one object that the file is."""
    decoder = json.JSONDecoder()
    text = reader.read(PART).lstrip("\ufeff \t\r\n")
    if not text.startswith("["):
        text += reader.read(LONGEST_OBJECT)
        if len(text) > LONGEST_OBJECT:
            raise ValueError(f"{path}: one object of JSON must have at most {LONGEST_OBJECT:,} bytes. Received: more.")
        yield f"{path}, row 1", parsed(text, f"{path}, row 1")
        return
    text, number = text[1:], 0
    while True:
        text = text.lstrip(" \t\r\n,")
        number += bool(text)
        where = f"{path}, row {max(number, 1)}"
        if text.startswith("]"):
            return
        try:
            row, end = decoder.raw_decode(text) if text else (None, 0)
        except (json.JSONDecodeError, RecursionError) as error:
            more = reader.read(max(PART, len(text)))  # twice as much each time
            if not more or len(text) > LONGEST_ROW or isinstance(error, RecursionError):
                raise ValueError(f"{where} must be an object of JSON. Received: {text[:80]!r} ({error}).") from error
            text, number = text + more, number - 1
            continue
        if not text:
            text = reader.read(PART)
            if not text:
                raise ValueError(f"{path} is cut short: its list does not end. Fetch it again.")
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object of JSON. Received: {text[:80]!r}.")
        yield where, row
        text = text[end:]
