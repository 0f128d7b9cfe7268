"""The file that annotations are kept in, read with care: it may come from a stranger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from .columns import LONGEST_TEXT, MOST_FEATURES, NUMBERS, WORDS, Columns

FORMAT = "sae_transformers feature annotations"
KEY = b"sae_transformers"  # of the file's metadata
ROWS_AT_ONCE = 1024
MOST_ROWS = 2**24
MOST_VALUES = 64  # neighbours of a row
WIDEST = 2**14  # numbers of an embedding


def read_columns(path: str | Path) -> tuple[Columns, dict[str, str]]:
    """What `FeatureAnnotations.save` wrote: columns and facts.

    Raises:
        ValueError: it is something else, damaged, or holds more than there can be; the message names file and row.
        OSError: it cannot be read.
    """
    where = str(path)
    try:
        schema = pq.read_schema(path)
        about = json.loads((schema.metadata or {}).get(KEY, b"{}"))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{where} is no Parquet file, or damaged: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != 1:
        raise ValueError(f"Expected annotations that `save` wrote. Received: {where}, which says {about!r:.200}.")
    n, width, facts = about.get("n_features"), about.get("embedding"), about.get("facts", {})
    if type(n) is not int or not 0 <= n <= MOST_FEATURES or not isinstance(facts, dict):
        raise ValueError(f"{where} is damaged: `n_features` or `facts`. Received: {about!r:.200}.")
    columns, row = Columns(n or None), 0
    try:
        # A text that repeats is in memory once.
        with pq.ParquetFile(path, read_dictionary=[name for name in WORDS if name in schema.names]) as file:
            _check_sizes(file, where)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                _check_texts(batch, f"{where}, after row {row}")
                for values in batch.to_pylist():
                    row += 1
                    _add(columns, values, width, f"{where}, row {row}")
    except pa.ArrowException as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    return columns, {str(name): str(value) for name, value in facts.items()}


def _add(columns: Columns, values: dict[str, Any], width: Any, where: str) -> None:
    feature, vector = columns.feature(values.get("feature"), where), values.get("embedding")
    if vector is not None:
        if not isinstance(vector, bytes) or len(vector) % 2:
            raise ValueError(f"{where}: an embedding must be halves in bytes. Received: {vector!r:.80}.")
        vector = np.frombuffer(vector, np.float16)
        if len(vector) != width:
            raise ValueError(f"{where}: an embedding of {len(vector)} numbers. Expected {width}.")
    known = {name: values.get(name) for name in ("explainer", "method", "score")}
    columns.describe(feature, values.get("description"), where, embedding=vector, **known)
    for name in NUMBERS:
        columns.set(feature, name, values.get(name), where)
    columns.near(feature, values.get("neighbours"), where)


def _check_sizes(file: pq.ParquetFile, where: str) -> None:
    """Before anything is unpacked: a small file may hold more than fits into memory."""
    metadata = file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    values = max(
        (g.column(n).num_values / max(g.num_rows, 1) for g in groups for n in range(g.num_columns)), default=0
    )
    widest = max((t.byte_width for t in file.schema_arrow.types if pa.types.is_fixed_size_binary(t)), default=0)
    if metadata.num_rows > MOST_ROWS or values > MOST_VALUES or widest > 2 * WIDEST:
        raise ValueError(
            f"{where} must have at most {MOST_ROWS:,} rows, {MOST_VALUES} values in one and {WIDEST:,} numbers in an "
            f"embedding. Received: {metadata.num_rows:,} rows, up to {values:g} values, {widest // 2:,} numbers."
        )


def _check_texts(batch: pa.RecordBatch, where: str) -> None:
    for name in WORDS:
        column: Any = batch.column(name) if name in batch.schema.names else None
        if not isinstance(column, pa.DictionaryArray) or not len(column.dictionary):
            continue
        lengths = pyarrow.compute.call_function("binary_length", [column.dictionary])
        longest = pyarrow.compute.call_function("max", [lengths]).as_py() or 0
        if longest > 4 * LONGEST_TEXT:  # bytes
            raise ValueError(f"{where}: `{name}` must have at most {LONGEST_TEXT:,} characters. Received: more.")
