"""Rows of text files of five kinds, also compressed, read one after the other."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from .safe_texts import from_cell, to_cell

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TXT_ROWS = ("paragraph", "line", "file")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file that are not empty, such as prompts."""
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def suffix_of(name: str) -> str | None:
    """The kind of a file, or None if it is none of ours; `a.jsonl.gz` is .jsonl."""
    path = PurePosixPath(name)
    suffix = PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in SUFFIXES else None


def rows_of_file(fs: Any, name: str, txt_rows: str) -> Iterator[Mapping[str, Any]]:
    suffix = suffix_of(name)
    if suffix == ".parquet":
        from datasets import load_dataset

        yield from load_dataset("parquet", data_files=fs.unstrip_protocol(name), split="train", streaming=True)  # pyright: ignore[reportReturnType]
        return
    csv.field_size_limit(sys.maxsize)
    newline = "" if suffix == ".csv" else None
    try:
        with (
            fs.open(name, "rb", compression="infer") as raw,
            io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as file,
        ):
            if suffix == ".csv":
                yield from ({_cell(name): _cell(cell) for name, cell in row.items()} for row in csv.DictReader(file))
            elif suffix == ".txt":
                yield from ({"text": text} for text in _texts_of(file, txt_rows))
            else:
                yield from _objects_of(file, PurePosixPath(name).name)
    except UnicodeDecodeError as error:
        raise ValueError(f"Text files are UTF-8. Received: {PurePosixPath(name).name}: {error}.") from None


class _UnixLines:
    """Ends lines as Unix does. A writer that is told to do so leaves carriage returns unquoted, which cut the row."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def write_csv(file: TextIO, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as CSV, ended by line feeds; no text is a formula (`to_cell`)."""
    csv.writer(_UnixLines(file)).writerows([to_cell(value) for value in row] for row in rows)


def _cell(cell: Any) -> Any:
    """A cell's text; what is missing or too much in a row stays as the reader marks it."""
    return from_cell(cell) if isinstance(cell, str) else cell


def _texts_of(file: Iterable[str], txt_rows: str) -> Iterator[str]:
    if txt_rows == "file":
        yield "".join(file)
    elif txt_rows == "line":
        yield from (line.rstrip("\n") for line in file)
    else:
        for blank, lines in itertools.groupby(file, lambda line: not line.strip()):
            if not blank:
                yield "".join(lines).strip()


def _objects_of(file: io.TextIOBase, name: str) -> Iterator[Mapping[str, Any]]:
    """Objects one a line, or one list of them."""
    first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            entries = json.loads(first + file.read())
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is no list of JSON objects: {error}.") from None
        numbered = enumerate(entries)
    else:
        numbered = ((number, line) for number, line in enumerate(itertools.chain([first], file), 1) if line.strip())
    for number, entry in numbered:
        if isinstance(entry, str):
            try:
                entry = json.loads(entry)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {name} is no JSON object: {error}.") from None
        if not isinstance(entry, Mapping):
            raise ValueError(f"Entry {number} of {name} is no JSON object. Received: {str(entry)[:60]!r}.")
        yield entry
