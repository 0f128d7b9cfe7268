"""Rows of text, with labels where there are any: from memory, from the Hub or from files, read block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from fsspec.core import url_to_fs
from torch import Tensor

from .image_texts import opened_images
from .text_files import SUFFIXES, TXT_ROWS, rows_of_file, suffix_of

LABEL_NAMES = {
    "0": 0, "neg": 0, "negative": 0, "false": 0, "0.0": 0,
    "1": 1, "pos": 1, "positive": 1, "true": 1, "1.0": 1,
}  # fmt: skip
UNKNOWN = -100.0
ROW_NUMBERS = ("", "index", "unnamed: 0")  # columns, as pandas writes them
UNKNOWN_LABELS = ("", "-100", "-100.0", "none", "null", "nan")


class TextRows(NamedTuple):
    """texts: of consecutive rows. labels: (n_rows, n_labels) float32: 0, 1 or -100 for unknown.

    images: of each row, where the source has a column of images.
    """

    texts: list[str]
    labels: Tensor
    images: list[list[Any]] | None = None


class TextSource:
    """Rows in a fixed order, of which any stretch can be read; reading onwards is cheap.

    Args:
        iterate: gives the rows from a number on, which is 0 where `length` is None.
        column: the text; `prompt.text` is the field `text` of the column `prompt`.
        labels: columns with 0, 1 (or the names that `LABEL_NAMES` has) or nothing (-100, empty) for unknown.
        length: number of rows where it is known; then starting at a row must cost less than reading up to it.
        facts: what identifies the rows, as JSON values.
        images: column of a row's image or images, see `opened_images`.
    """

    def __init__(
        self,
        iterate: Callable[[int], Iterable[Mapping[str, Any]]],
        *,
        column: str = "text",
        labels: Sequence[str] = (),
        length: int | None = None,
        facts: Mapping[str, Any] | None = None,
        images: str | None = None,
    ) -> None:
        self.column, self.labels, self.images = column, tuple(labels), images
        self.facts = {"column": column, **({} if images is None else {"images": images}), **(facts or {})}
        self.n_rows = length  # known at the latest when the end was seen
        self._iterate, self._seekable = iterate, length is not None
        self._rows: Iterator[Mapping[str, Any]] = iter(())
        self._position: int | None = None

    def first(self, count: int) -> TextSource:
        """The same rows up to a number.

        Raises:
            ValueError: the number is not positive.
        """
        if count < 1:
            raise ValueError(f"`max_rows` must be 1 or more, or None for all. Received: max_rows={count!r}.")
        length = None if self.n_rows is None else min(self.n_rows, count)
        return TextSource(
            lambda start: itertools.islice(self._iterate(start), max(0, count - start)),
            column=self.column,
            labels=self.labels,
            length=length,
            facts={**self.facts, "max_rows": count},
            images=self.images,
        )

    def rows(self) -> Iterable[Mapping[str, Any]]:
        """Every row as it is, with all its columns."""
        return self._iterate(0)

    def read(self, start: int, count: int) -> TextRows:
        """Rows `start` to `start + count`, fewer at the end, none behind it.

        Raises:
            ValueError: a column is missing, a text is no string, a label is unknown, or an image cannot be read.
        """
        if self.n_rows is not None:
            count = max(0, min(count, self.n_rows - start))
        rows = self._seek(start, count) if count else []
        texts = [self._text(row, start + i) for i, row in enumerate(rows)]
        values = [[self._label(row, name, start + i) for name in self.labels] for i, row in enumerate(rows)]
        labels = torch.tensor(values, dtype=torch.float32).view(len(rows), len(self.labels))
        if self.images is None:
            return TextRows(texts, labels)
        images = [opened_images(value_at(row, self.images, start + i), start + i) for i, row in enumerate(rows)]
        return TextRows(texts, labels, images)

    def _seek(self, start: int, count: int) -> list[Mapping[str, Any]]:
        if self._position is None or start < self._position or (self._seekable and start != self._position):
            self._position = start if self._seekable else 0
            self._rows = iter(self._iterate(self._position))
        self._position += sum(1 for _ in itertools.islice(self._rows, start - self._position))
        rows = list(itertools.islice(self._rows, count)) if self._position == start else []
        self._position += len(rows)
        if self._position < start + count:
            self.n_rows = self._position
        return rows

    def blocks(self, size: int, numbers: Iterable[int]) -> Iterator[tuple[int, TextRows]]:
        """Blocks of `size` rows of these ascending numbers, with their numbers, up to the end of the rows."""
        for number in numbers:
            rows = self.read(number * size, size)
            if not rows.texts:
                return
            yield number, rows

    def _text(self, row: Mapping[str, Any], number: int) -> str:
        text = value_at(row, self.column, number)
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"The text must be a string; name its column with `column`. "
                f"Received: {self.column}={text!r} in row {number}."
            )
        return text or ""

    def _label(self, row: Mapping[str, Any], name: str, number: int) -> float:
        value = value_at(row, name, number)
        key = str(value).strip().lower()
        if key in UNKNOWN_LABELS:
            return UNKNOWN
        if key not in LABEL_NAMES:
            raise ValueError(
                f"Labels must be 0 or 1 (or false, true), or -100 or empty where unknown. "
                f"Received: {name}={value!r} in row {number}."
            )
        return float(LABEL_NAMES[key])


def value_at(row: Mapping[str, Any], column: str, number: int) -> Any:
    """A column of a row, or field b of column a as `a.b`; a column whose own name has a dot comes first.

    Raises:
        ValueError: the row, whose number is for the error, does not have it.
    """
    if column in row:
        return row[column]
    found: Any = row
    for part in column.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(
                f"Every row needs the column {column!r}. Received: columns "
                f"{', '.join(map(repr, row)) or 'none'} in row {number}."
            )
        found = found[part]
    return found


def column_of(rows: Sequence[Mapping[str, Any]], source: str, name: str) -> list[Any]:
    """A column of rows; `source` is for the error.

    Raises:
        ValueError: a row has no value there.
    """
    for number, row in enumerate(rows, 1):
        if row.get(name) is None:
            known = ", ".join(repr(key) for key in row if key is not None)
            raise ValueError(
                f"Every row of {source!r} needs a column {name!r}; row {number} has none. Received: {known}."
            )
    return [row[name] for row in rows]


def read_column(source: str, column: str | None = None, *, keep_empty: bool = False) -> list[str]:
    """The texts of a file, folder or Hub data set.

    Args:
        source: as `open_text` takes it.
        column: by default `text`, or the only one beside a row number.
        keep_empty: keep texts without a word, where rows of two columns or files belong together.

    Raises:
        ValueError: no row, no such column, several that may be meant, or no text with a word.
    """
    rows = list(open_text(source).rows())
    if not rows:
        raise ValueError(f"Expected rows of text. Received: none in {source!r}.")
    if column is None:
        names = [name for name in rows[0] if name is not None and name.lower() not in ROW_NUMBERS]
        column = "text" if "text" in names else names[0] if len(names) == 1 else None
        if column is None:
            raise ValueError(f"Which column of {source!r} is the text? Name it. Received: columns {names}.")
    texts = [text for text in map(str, column_of(rows, source, column)) if keep_empty or text.strip()]
    if not texts:
        raise ValueError(f"Expected texts with a word. Received: none in column {column!r} of {source!r}.")
    return texts


# -- where rows come from --------------------------------------------------------------------------------------------


def rows_of_list(
    texts: Sequence[str],
    labels: Mapping[str, Sequence[Any]] | None = None,
    *,
    images: Sequence[Any] | None = None,
    name: str = "list",
) -> TextSource:
    """Texts in memory, with a list of values for each label, and of images where there are any."""
    columns = dict(labels or {})
    names = tuple(columns)
    if images is not None:
        columns["images"] = images
    if wrong := [key for key, values in columns.items() if len(values) != len(texts)]:
        raise ValueError(
            f"Every column needs {len(texts)} values. Received: {len(columns[wrong[0]])} for {wrong[0]!r}."
        )

    def iterate(start: int) -> Iterator[Mapping[str, Any]]:
        for i in range(start, len(texts)):
            yield {"text": texts[i], **{key: values[i] for key, values in columns.items()}}

    facts = {"text": name, "rows": len(texts)}
    column = None if images is None else "images"
    return TextSource(iterate, labels=names, length=len(texts), facts=facts, images=column)


def open_text(
    source: str,
    *,
    column: str = "text",
    labels: Sequence[str] = (),
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    txt_rows: str = "paragraph",
    images: str | None = None,
) -> TextSource:
    """Rows of a Hub data set, a file, a folder or a glob of files, local or behind any fsspec URL.

    Files are .txt, .jsonl, .json, .csv or .parquet, also compressed, in the order of their names.

    Args:
        split, subset, revision: of a Hub data set.
        streaming: read a Hub data set over the network as it is needed, in place of a copy on disk.
        txt_rows: what a row of a .txt file is: `paragraph` (blank lines between), `line` or `file`.
        images: column of a row's image or images: pictures, their bytes, or paths of files here.

    Raises:
        OSError: nothing there.
        ValueError: no file of a known kind.
    """
    if txt_rows not in TXT_ROWS:
        raise ValueError(f"`txt_rows` must be one of {', '.join(TXT_ROWS)}. Received: txt_rows={txt_rows!r}.")
    fs, place = url_to_fs(source)
    if "://" not in source and not any(c in source for c in "*?[") and not fs.exists(place):
        if suffix_of(source):
            raise FileNotFoundError(f"There is no file {source!r}.")
        dataset = _load_hub(source, subset, split=split, revision=revision, streaming=streaming)
        facts = {"text": source, "subset": subset, "split": split, "revision": revision}
        length = None if streaming else len(dataset)
        rows = rows_of_dataset(dataset)
        return TextSource(rows, column=column, labels=labels, length=length, facts=facts, images=images)
    if fs.isdir(place):
        found = [name for name in fs.find(place) if suffix_of(name)]
    else:
        found = [str(name) for name in fs.glob(place)] if any(c in place for c in "*?[") else [place]
    files = sorted(name for name in found if fs.isfile(name))
    if not files:
        raise FileNotFoundError(f"There is no file {source!r} of {', '.join(SUFFIXES)}.")
    if wrong := [name for name in files if not suffix_of(name)]:
        raise ValueError(f"Text files end in {', '.join(SUFFIXES)}. Received: {PurePosixPath(wrong[0]).name!r}.")

    def iterate(start: int) -> Iterator[Mapping[str, Any]]:
        return itertools.islice(
            itertools.chain.from_iterable(rows_of_file(fs, name, txt_rows) for name in files), start, None
        )

    # Sizes, so that a harvest does not go on with a file that has changed.
    sizes = {PurePosixPath(name).name: fs.size(name) for name in files}
    facts = {"text": source, "files": sizes, "txt_rows": txt_rows}
    return TextSource(iterate, column=column, labels=labels, facts=facts, images=images)


def _load_hub(name: str, subset: str | None, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, **options)
    except Exception as error:  # whatever it raises, the user typed a name that gave no data
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"{name!r} is no file, and it could not be read as a Hub data set: {reason[0]}") from error


def rows_of_dataset(dataset: Any) -> Callable[[int], Iterable[Mapping[str, Any]]]:
    """What gives the rows of a `datasets.Dataset` from a number on, or of a streaming one."""
    if hasattr(dataset, "__len__"):
        return lambda start: (dataset[i] for i in range(start, len(dataset)))
    return lambda start: dataset.skip(start)
