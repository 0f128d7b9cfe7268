"""Annotations as delphi (EleutherAI's automated interpretability) leaves them.

explanations/{module}_latent{n}.txt     the explanation, a text of JSON
scores/{scorer}/{module}_latent{n}.txt  the scorer's judgement of each example, a list of JSON
latents/{module}/{first}_{last}.safetensors   activations: locations (n, 3) of row, token and latent - first
run_config.json                         who explained
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ....latents.annotations.columns import Columns, shown
from ....latents.annotations.table import FeatureAnnotations
from .json_rows import LONGEST_ROW

LATENT = re.compile(r"(?P<module>.+)_latent(?P<number>\d{1,9})\.txt")
RANGE = re.compile(r"(\d{1,9})_(\d{1,9})\.safetensors")


def is_delphi(path: Path) -> bool:
    """Whether a folder is a run of delphi's."""
    folder = path / "explanations"
    return folder.is_dir() and any(LATENT.fullmatch(file.name) for file in folder.iterdir())


def read_delphi(
    path: Path,
    *,
    module: str | None = None,
    n_features: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> FeatureAnnotations:
    """The annotations in the folder of a run: explanations, their scores, and from the activations, where they are
    there, frequency and maximum. An explanation's score is the mean over scorers of the share of right judgements.

    Args:
        module: whose latents, as in the names of the files; needed where the run has several.
        n_features: latents of the SAE; others are an error.
        progress: called with (explanations done, explanations).

    Raises:
        ValueError: a file is not what it should be, or the run has several modules.
        OSError: a file cannot be read.
    """
    named = [
        (found, file) for file in sorted((path / "explanations").iterdir()) if (found := LATENT.fullmatch(file.name))
    ]
    modules = sorted({found["module"] for found, _ in named})
    if module not in modules and (module is not None or len(modules) != 1):
        raise ValueError(f"`module` must be one of {', '.join(modules) or 'none'}. Received: module={module!r}.")
    module = modules[0] if module is None else module
    files = [(int(found["number"]), file) for found, file in named if found["module"] == module]
    explainer = _explainer(path / "run_config.json")
    scorers = sorted(folder for folder in (path / "scores").glob("*") if folder.is_dir())
    columns = Columns(n_features)
    used: set[str] = set()
    for done, (number, file) in enumerate(sorted(files), 1):
        feature = columns.feature(number, str(file))
        scores = {}
        for folder in scorers:
            if (folder / file.name).is_file() and (right := _right(folder / file.name)) is not None:
                scores[folder.name] = right
        used |= set(scores)
        score = sum(scores.values()) / len(scores) if scores else None
        columns.describe(feature, _value(file), str(file), explainer=explainer, method="delphi", score=score)
        if progress is not None:
            progress(done, len(files))
    for file in sorted((path / "latents" / str(module)).glob("*.safetensors")):
        _activations(file, columns)
    facts = {
        "source": f"delphi, {module}",
        "sae": module,
        "score": f"share right: {', '.join(sorted(used))}" if used else "",
    }
    return FeatureAnnotations.from_columns(columns, facts)


def _value(file: Path) -> Any:
    """What a file of JSON holds."""
    if file.stat().st_size > LONGEST_ROW:
        raise ValueError(f"{file} must have at most {LONGEST_ROW:,} bytes. Received: {file.stat().st_size:,}.")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON, as delphi writes it. Received: {error}.") from error


def _right(file: Path) -> float | None:
    """The share of examples that a scorer judged rightly; None of a scorer that judges none."""
    judged = _value(file)
    if not isinstance(judged, list) or not all(isinstance(one, dict) for one in judged):
        raise ValueError(f"{file} must hold a list of objects. Received: {shown(judged)}.")
    right = [one["correct"] for one in judged if isinstance(one.get("correct"), bool)]
    return sum(right) / len(right) if right else None


def _explainer(file: Path) -> str | None:
    config = _value(file) if file.is_file() else {}
    name = config.get("explainer_model") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def _activations(file: Path, columns: Columns) -> None:
    from safetensors.numpy import load_file

    found = RANGE.fullmatch(file.name)
    try:
        tensors = load_file(file)
        places, values, tokens = tensors["locations"], tensors["activations"], tensors["tokens"]
        first = int(found[1]) if found else 0
        latents = places[:, 2].astype(np.int64) + first
        if len(values) != len(latents):
            raise ValueError(f"{len(latents)} locations and {len(values)} activations")
    except Exception as error:  # safetensors' own error has no common class
        raise ValueError(f"{file} must hold `locations`, `activations` and `tokens`. Received: {error}.") from error
    numbers, counts = np.unique(latents, return_counts=True)
    tops = np.full(len(numbers), -np.inf)
    np.maximum.at(tops, np.searchsorted(numbers, latents), values.astype(np.float64))
    for number, count, top in zip(numbers.tolist(), counts.tolist(), tops.tolist(), strict=True):
        feature = columns.feature(number, str(file))
        columns.set(feature, "maximum", top, str(file))
        columns.set(feature, "frequency", count / max(tokens.size, 1), str(file))
