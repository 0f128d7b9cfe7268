"""Feature tables as files: three forms of one table, in a folder.

features.parquet   a row a latent, exact: numbers, and lists of tokens, token ids, weights and contexts
features.csv       the same columns for a spreadsheet; lists are JSON arrays, unknown numbers are empty
features.json      {"feature_0": {"top_words": "w1 w2 ..."}}, the form of the original, without markers
facts.json         what was done; written last

Both tables read back as the same `FeatureTable`; the JSON file does not, since words are joined by spaces there.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...latents.safe_texts import from_cell
from ...latents.text_files import write_csv
from .table import FeatureTable, LogitWeights

STATISTICS = ("mean", "std", "skewness", "kurtosis")
NUMBERS = (
    *STATISTICS,
    "published_sparsity",
    "log10_frequency",
    "coherence",
)  # one of these a latent; nan where unknown
LISTS = (
    "top_tokens", "top_weights", "top_ids", "bottom_tokens", "bottom_weights", "bottom_ids",
    "contexts", "context_scores",
)  # fmt: skip
NEEDED = ("feature", *STATISTICS, *LISTS[:6])
FILES = ("features.parquet", "features.csv", "features.json", "facts.json")
CELL = 2**27  # characters: the longest cell of a csv file that is read


def write_feature_table(table: FeatureTable, folder: str | Path) -> list[Path]:
    """Write the four files; all of them, or none.

    Returns:
        Their paths.

    Raises:
        OSError: there is no room or no access; then the folder is as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = table_columns(table)
    writers: dict[str, Callable[[Path], object]] = {
        "features.parquet": lambda path: _write_parquet(columns, path),
        "features.csv": lambda path: _write_csv(columns, path),
        "features.json": lambda path: _write_json(original_form(table), path),
        "facts.json": lambda path: _write_json(table.facts, path),
    }
    drafts = {name: folder / f".{name}.{os.getpid()}" for name in writers}
    try:
        for name, write in writers.items():
            write(drafts[name])
        for name, draft in drafts.items():
            draft.replace(folder / name)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return [folder / name for name in writers]


def read_feature_table(path: str | Path) -> FeatureTable:
    """A table that `write_feature_table` wrote: a folder, its features.parquet or its features.csv.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is no table of features, or its rows are not features 0, 1, 2, ...
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILES[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no feature table at {str(path)!r}: `sae-transformers feature-table` writes it."
        )
    columns = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    if missing := [name for name in NEEDED if name not in columns]:
        raise ValueError(f"A feature table has columns {', '.join(NEEDED)}. Received: {path.name} without {missing}.")
    if columns["feature"] != list(range(len(columns["feature"]))):
        raise ValueError(f"Rows must be features 0, 1, 2, ... Received: {path.name} with others, or in other order.")
    facts = path.parent / "facts.json"
    numbers = {name: _number_column(columns[name]) for name in NUMBERS if name in columns}
    weights = LogitWeights(
        *(numbers.pop(name) for name in STATISTICS),
        *(
            torch.tensor(columns[f"{end}_{kind}"], dtype=torch.float32 if kind == "weights" else torch.long)
            for end in ("top", "bottom")
            for kind in ("ids", "weights")
        ),
    )
    known = {"feature", "dead", *NUMBERS, *LISTS}
    return FeatureTable(
        weights,
        columns["top_tokens"],
        columns["bottom_tokens"],
        dead=torch.tensor(columns["dead"]) if "dead" in columns else None,
        notes={name: list(column) for name, column in columns.items() if name not in known},
        facts=json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {},
        published_sparsity=numbers.get("published_sparsity"),
        log10_frequency=numbers.get("log10_frequency"),
        coherence=numbers.get("coherence"),
        contexts=columns.get("contexts"),
        context_scores=columns.get("context_scores"),
    )


def table_columns(table: FeatureTable) -> dict[str, list[Any]]:
    """The table by columns, as plain values: what is unknown has no column."""
    found: dict[str, list[Any]] = {"feature": list(range(len(table)))}
    for name in STATISTICS:
        found[name] = getattr(table.weights, name).tolist()
    for name in ("published_sparsity", "log10_frequency", "dead", "coherence"):
        if (column := getattr(table, name)) is not None:
            found[name] = column.tolist()
    found["top_tokens"], found["bottom_tokens"] = table.top_tokens, table.bottom_tokens
    for end in ("top", "bottom"):
        for kind in ("weights", "ids"):
            found[f"{end}_{kind}"] = getattr(table.weights, f"{end}_{kind}").tolist()
    for name in ("contexts", "context_scores"):
        if (column := getattr(table, name)) is not None:
            found[name] = column
    return {**found, **table.notes}


def original_form(table: FeatureTable) -> dict[str, dict[str, str]]:
    """`{"feature_i": {"top_words": "..."}}`: tokens without their outer white space, joined by one space."""
    return {
        f"feature_{i}": {"top_words": " ".join(token.strip() for token in tokens)}
        for i, tokens in enumerate(table.top_tokens)
    }


def _write_parquet(columns: Mapping[str, list[Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {"top_weights": pyarrow.float32(), "bottom_weights": pyarrow.float32()}
    arrays = {
        name: pyarrow.array(column, pyarrow.list_(kinds[name])) if name in kinds else pyarrow.array(column)
        for name, column in columns.items()
    }
    if "contexts" in columns:  # all lists may be empty, and then have no type
        arrays["contexts"] = pyarrow.array(columns["contexts"], pyarrow.list_(pyarrow.string()))
        arrays["context_scores"] = pyarrow.array(columns["context_scores"], pyarrow.list_(pyarrow.float64()))
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path.name} is no Parquet file: {str(error).splitlines()[0]}") from error


def _write_csv(columns: Mapping[str, list[Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write_csv(file, [columns, *(map(_cell, row) for row in zip(*columns.values(), strict=True))])


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return int(value)
    return "" if isinstance(value, float) and math.isnan(value) else value


def _read_csv(path: Path) -> dict[str, list[Any]]:
    limit = csv.field_size_limit(CELL)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    finally:
        csv.field_size_limit(limit)
    if wrong := next((number for number, row in enumerate(rows, 2) if len(row) != len(header)), None):
        raise ValueError(
            f"Expected {len(header)} cells. Received: {len(rows[wrong - 2])} in {path.name}, row {wrong}."
        )
    columns: dict[str, list[Any]] = {}
    for name, cells in zip(map(from_cell, header), zip(*rows, strict=True), strict=False):
        try:
            if name in LISTS:
                columns[name] = [json.loads(cell) for cell in cells]
            elif name in NUMBERS:
                columns[name] = [float(cell) if cell else math.nan for cell in cells]
            elif name in ("feature", "dead"):
                columns[name] = [(int if name == "feature" else _flag)(cell) for cell in cells]
            else:
                columns[name] = list(map(from_cell, cells))
        except ValueError as error:
            raise ValueError(f"Column {name!r} of {path.name} could not be read: {error}.") from error
    return columns


def _flag(cell: str) -> bool:
    return bool(int(cell))


def _number_column(values: list[Any]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
