"""Annotations as Neuronpedia has them: the files of its public store, its exports and what its API answers.

    {modelId}/{source}/explanations/batch-{i}.jsonl.gz
        a row an explanation: index, description, explanationModelName, typeName, embedding
    {modelId}/{source}/features/batch-{i}.jsonl.gz
        a row a feature: index, maxActApprox, frac_nonzero, topkCosSimIndices
    {modelId}/{source}/activations/batch-{i}.jsonl.gz
        a row a text: index, tokens, values, maxValue

A batch may have any number of rows. Other keys are left alone. Maxima are those of activations times the norm of the
decoder row, as SAELens' `fold_W_dec_norm` makes them before a dashboard is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ....latents.annotations.columns import Columns, shown
from ....latents.annotations.table import FOLDED, FeatureAnnotations
from .json_rows import Row, json_rows

FOLDERS = ("explanations", "features", "activations")
SITE = "https://www.neuronpedia.org"
LICENCE = "the files name none: ask those who made the explanations before you publish them"
BATCH = re.compile(r"batch-(\d{1,9})\.jsonl(\.gz)?")
INDEX = ("index", "feature_index", "feature")


def is_neuronpedia(path: Path) -> bool:
    """Whether a folder is one source in Neuronpedia's layout."""
    return any(_batches(path / name) for name in FOLDERS)


def read_neuronpedia(
    path: Path, *, n_features: int | None = None, progress: Callable[[int, int], object] | None = None
) -> FeatureAnnotations:
    """The annotations in a source's folder, or in one file: .jsonl or .json, with .gz or without.

    Args:
        n_features: latents of the SAE; a row of another is an error.
        progress: called with (files done, files).

    Raises:
        ValueError: a row is not what it should be, or of another source than the first; the message names file and
            row. Or there is no row.
        OSError: a file cannot be read.
    """
    files = [path]
    if path.is_dir():
        found = {name: _batches(path / name) for name in FOLDERS}
        if found["features"]:
            found["activations"] = []  # whose maxima are in the features
        files = [file for name in FOLDERS for file in found[name]] or sorted(path.glob("batch-*.json"))
    reader = _Reader(n_features)
    for done, file in enumerate(files, 1):
        reader.read(json_rows(file))
        if progress is not None:
            progress(done, len(files))
    return reader.finish(path)


def _batches(folder: Path) -> list[Path]:
    numbered = [(BATCH.fullmatch(file.name), file) for file in folder.glob("batch-*")] if folder.is_dir() else []
    return [file for found, file in sorted(((found, file) for found, file in numbered if found), key=_number)]


def _number(found: Any) -> tuple[int, str]:
    return int(found[0][1]), found[1].name


class _Reader:
    """Takes rows of any of the kinds."""

    def __init__(self, n_features: int | None) -> None:
        self.columns = Columns(n_features)
        self.source: tuple[str, str] | None = None
        self.rows = 0
        self.scores: set[str] = set()

    def read(self, rows: Iterable[Row]) -> None:
        for where, row in rows:
            self.rows += 1
            nested = row.get("features")
            inside = nested if isinstance(nested, list) else None
            if inside is None and not any(name in row for name in INDEX):
                inside = row.get("explanations")  # a list under one name
            if isinstance(inside, list):
                for number, one in enumerate(inside):
                    self._add(one, f"{where}, entry {number}")
            else:
                self._add(row, where)

    def _add(self, row: Any, where: str) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object. Received: {shown(row)}.")
        self._check_source(row, where)
        name = next((name for name in INDEX if name in row), None)
        if name is None:
            raise ValueError(f"{where}: expected the number of a latent in `index`. Received: {shown(sorted(row))}.")
        feature = self.columns.feature(row[name], where)
        if "description" in row:
            self._describe(feature, row, where)
        for number, one in enumerate(_list(row, "explanations", where)):
            place = f"{where}, explanation {number}"
            if not isinstance(one, dict):
                raise ValueError(f"{place}: expected an object. Received: {shown(one)}.")
            self._describe(feature, one, place)
        self.columns.set(feature, "maximum", row.get("maxActApprox"), where)
        self.columns.set(feature, "frequency", row.get("frac_nonzero"), where)
        self.columns.near(feature, row.get("topkCosSimIndices"), where)
        if "tokens" in row:
            self.columns.set(feature, "maximum", row.get("maxValue"), where)
        elif row.get("maxActApprox") is None:
            for number, one in enumerate(_list(row, "activations", where)):
                if isinstance(one, dict):
                    values = [self.columns.number(v, "values", where) for v in _list(one, "values", where)]
                    top = max((value for value in values if value is not None), default=None)
                    self.columns.set(feature, "maximum", top, f"{where}, activation {number}")

    def _describe(self, feature: int, row: dict[str, Any], where: str) -> None:
        scores = []
        for one in _list(row, "scores", where):
            if isinstance(one, dict):
                scores.append(self.columns.number(one.get("value"), "scores", where))
                self.scores.add(str(one.get("explanationScoreTypeName") or one.get("typeName") or "score"))
        known = [score for score in scores if score is not None]
        score = sum(known) / len(known) if known else row.get("score")
        self.columns.describe(
            feature, row.get("description"), where, explainer=row.get("explanationModelName"),
            method=row.get("typeName"), score=score, embedding=row.get("embedding"),
        )  # fmt: skip

    def _check_source(self, row: dict[str, Any], where: str) -> None:
        if row.get("modelId") is None and row.get("layer") is None:
            return
        source = str(row.get("modelId")), str(row.get("layer"))
        self.source = self.source or source
        if source != self.source:
            raise ValueError(
                f"{where}: expected rows of one source, {'/'.join(self.source)!r}. Received: one of "
                f"{shown('/'.join(source))}; give each a file or a folder of its own."
            )

    def finish(self, path: Path) -> FeatureAnnotations:
        if not self.rows:
            raise ValueError(f"Expected annotations in Neuronpedia's layout. Received: {str(path)!r} without a row.")
        model, source = self.source or ("", "")
        facts = {
            "source": f"Neuronpedia, {model}/{source}" if source else f"Neuronpedia's layout, {path.name}",
            "licence": LICENCE, "model": model, "sae": source, "maxima": FOLDED,
            "score": ", ".join(sorted(self.scores)), "page": f"{SITE}/{model}/{source}" if source else "",
        }  # fmt: skip
        return FeatureAnnotations.from_columns(self.columns, facts)


def _list(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{where}: `{name}` must be a list. Received: {shown(value)}.")
    return value or []
