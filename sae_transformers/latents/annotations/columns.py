"""Descriptions and numbers of features as columns, filled row by row: no object for each row is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

MOST_FEATURES = 2**24  # a number beyond it is a mistake, and columns of its length would not fit into memory
ROWS_AT_ONCE = 2**16  # Python values that wait before they become a part of a column
NUMBERS = ("maximum", "frequency", "output_score")
LONGEST_TEXT = 2**16  # characters of a description
SHOWN = 80  # characters of a wrong value in a message
WORDS = ("description", "explainer", "method")
SCHEMA = pa.schema([("feature", pa.int32()), *((name, pa.large_string()) for name in WORDS), ("score", pa.float32())])


def shown(value: Any) -> str:
    """A value from a file for a message: as Python writes it, cut."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Columns:
    """Gathers what files say of features; `where` names the file and the row in every error.

    Args:
        n_features: latents of the SAE; None: as many as the largest number needs.
    """

    def __init__(self, n_features: int | None = None) -> None:
        self.n_features = n_features
        self.known = 0
        self.width: int | None = None  # of embeddings
        self._waiting: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._batches: list[pa.RecordBatch] = []
        self._vectors: list[Any] = []
        self._has_vectors = False
        self._numbers: dict[str, np.ndarray] = {}
        self._neighbours: np.ndarray | None = None

    def feature(self, value: Any, where: str) -> int:
        """The number of a latent, given as a number or in digits.

        Raises:
            ValueError: it is none, or beyond the SAE's last.
        """
        number = value
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 12:
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{where}: the number of a latent must be whole, from 0. Received: {shown(value)}.")
        most = self.n_features or MOST_FEATURES
        if number >= most:
            of = "The SAE has" if self.n_features else "At most"
            raise ValueError(f"{where}: {of} {most:,} latents, numbered from 0. Received: {shown(value)}.")
        self.known = max(self.known, number + 1)
        return number

    def describe(
        self,
        feature: int,
        text: Any,
        where: str,
        *,
        explainer: Any = None,
        method: Any = None,
        score: Any = None,
        embedding: Any = None,
    ) -> None:
        """Add a description; one without a word is left out.

        Args:
            feature: of `feature`.
            text: kept as it is, but for white space at its ends.
            embedding: its numbers, or the JSON of them.

        Raises:
            ValueError: a text is none, or embeddings differ in length.
        """
        for name, value in (("description", text), ("explainer", explainer), ("method", method)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}: `{name}` must be a text. Received: {shown(value)}.")
            if value is not None and len(value) > LONGEST_TEXT:
                raise ValueError(
                    f"{where}: `{name}` must have at most {LONGEST_TEXT:,} characters. Received: {len(value):,}."
                )
        if text is None or not text.strip():
            return
        empty = embedding is None or (isinstance(embedding, (str, list)) and not embedding)
        vector = None if empty else self._vector(embedding, where)
        row = (feature, text.strip(), explainer or None, method or None, self.number(score, "score", where))
        for column, value in zip(self._waiting.values(), row, strict=True):
            column.append(value)
        self._vectors.append(vector)
        self._has_vectors |= vector is not None
        if len(self._vectors) % ROWS_AT_ONCE == 0:
            self._flush()

    def set(self, feature: int, name: str, value: Any, where: str) -> None:
        """A number of a latent: one of `NUMBERS`. None and NaN say nothing; of several the largest counts."""
        number = self.number(value, name, where)
        if number is None:
            return
        column = self._numbers.get(name)
        if column is None or feature >= len(column):
            grown = np.full(self._length(feature, column), np.nan, np.float32)
            if column is not None:
                grown[: len(column)] = column
            self._numbers[name] = column = grown
        column[feature] = np.fmax(column[feature], number)

    def near(self, feature: int, numbers: Any, where: str, most: int = 10) -> None:
        """The latents nearest to one, nearest first; itself is left out."""
        if not numbers:
            return
        if not isinstance(numbers, list):
            raise ValueError(f"{where}: neighbours must be a list of latents. Received: {shown(numbers)}.")
        found = [self.feature(number, where) for number in numbers[: most + 1]]
        found = [number for number in found if number != feature][:most]
        if self._neighbours is None or feature >= len(self._neighbours):
            grown = np.full((self._length(feature, self._neighbours), most), -1, np.int32)
            if self._neighbours is not None:
                grown[: len(self._neighbours)] = self._neighbours
            self._neighbours = grown
        self._neighbours[feature, : len(found)] = found

    @staticmethod
    def number(value: Any, name: str, where: str) -> float | None:
        """A finite number; None for none.

        Raises:
            ValueError: it is something else.
        """
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 3e38:
            raise ValueError(f"{where}: `{name}` must be a finite number. Received: {shown(value)}.")
        return float(value)

    def finish(self) -> tuple[pa.Table, int, dict[str, np.ndarray], np.ndarray | None, np.ndarray | None]:
        """Descriptions by latent, the number of latents, numbers (n,) float32, neighbours (n, k) int32, embeddings
        (descriptions, d) float16 in the descriptions' order, zeros where there is none."""
        self._flush()
        table = pa.Table.from_batches(self._batches, SCHEMA)
        n = self.n_features or self.known
        order = np.argsort(table["feature"].to_numpy(), kind="stable")
        vectors = None
        if self._has_vectors and self.width is not None:
            zeros = np.zeros(self.width, np.float16)
            vectors = np.stack([zeros if row is None else row for row in self._vectors])[order]
        numbers = {name: as_long(column, n, np.nan) for name, column in self._numbers.items()}
        near = None if self._neighbours is None else as_long(self._neighbours, n, -1)
        return table.take(order).combine_chunks(), n, numbers, near, vectors

    def _length(self, feature: int, column: np.ndarray | None) -> int:
        twice = 0 if column is None else 2 * len(column)
        return self.n_features or max(feature + 1, min(twice, MOST_FEATURES), 1024)

    def _vector(self, given: Any, where: str) -> np.ndarray:
        if isinstance(given, np.ndarray) and given.dtype == np.float16 and self.width in (None, len(given)):
            self.width = len(given)
            return given  # of a file of ours, of unit length as far as halves can be
        try:
            values = json.loads(given) if isinstance(given, str) else given
            vector = np.asarray(values, np.float32)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{where}: `embedding` must be a list of numbers. Received: {shown(given)}.") from None
        if vector.ndim != 1 or not np.isfinite(vector).all() or self.width not in (None, len(vector)):
            wanted = "a list of finite numbers" + (f", {self.width} as in other rows" if self.width else "")
            raise ValueError(f"{where}: `embedding` must be {wanted}. Received: {shown(given)}.")
        self.width = len(vector)
        return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float16)

    def _flush(self) -> None:
        if self._waiting["feature"]:
            columns = [pa.array(values, SCHEMA.field(name).type) for name, values in self._waiting.items()]
            self._batches.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
            self._waiting = {name: [] for name in SCHEMA.names}


def as_long(column: np.ndarray, n: int, missing: float) -> np.ndarray:
    """A column of n rows, `missing` in those that it lacks."""
    if len(column) >= n:
        return column[:n]
    grown = np.full((n, *column.shape[1:]), missing, column.dtype)
    grown[: len(column)] = column
    return grown


def from_rows(rows: Sequence[Mapping[str, Any]], n_features: int | None, where: str) -> Columns:
    """Columns of mappings: feature, description, explainer, method, score, embedding, and `NUMBERS`."""
    found = Columns(n_features)
    for number, row in enumerate(rows):
        place = f"{where}, row {number}"
        feature = found.feature(row.get("feature"), place)
        words = {name: row.get(name) for name in ("explainer", "method", "score", "embedding")}
        found.describe(feature, row.get("description"), place, **words)
        for name in NUMBERS:
            found.set(feature, name, row.get(name), place)
        found.near(feature, row.get("neighbours"), place)
    return found
