"""SpARE's published caches, layer by layer: mutual information and expectation, and functional values where they are.

    layers = read_published_features("cache_data/Llama-2-7b-hf", layers=(12, 13, 14, 15))
    context, memory = select_features(scored(layers[0]), proportion=0.07, legacy=True)

The authors' repository (https://github.com/yuzhaouoe/SAE-based-representation-engineering, commit 9008a05) has of each
model `mutual_information/layer-L mi_expectation.pt` and `func_weights/NAME/layerL/use_{context,parameter}_weight.pt`.
Here the files may also lie together in a folder `layerL`. Nothing but tensors is read from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...modeling.conversion.checkpoint import read_pickle

SCORES = ("mutual_information.pt", "*mi_expectation.pt")
SCORE_NAMES = ("mi_scores", "expectation")
VALUES = ("use_context_weight.pt", "use_parameter_weight.pt")
LAYER = re.compile(r"(?<![a-z])layer-?(\d+)")


class PublishedFeatures(NamedTuple):
    """What is published of one layer. Context is behaviour A, memory (the parameters) is B.

    layer: None where neither a file nor a folder names it.
    mutual_information: (d_sae,) float64, nats. expectation: (d_sae,), mean under A less that under B.
    values: functional values of A and of B, (d_sae,) each; None where their files are not there.
    """

    layer: int | None
    mutual_information: Tensor
    expectation: Tensor
    values: tuple[Tensor, Tensor] | None


def read_published_features(folder: str | Path, layers: Sequence[int] = ()) -> list[PublishedFeatures]:
    """The layers of a published cache.

    Args:
        folder: of one model, or of one layer.
        layers: which, in this order; all of them, ascending, by default. A folder of a single layer whose name does
            not say which takes its number from here.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a layer, or a file of one, is not there or there twice, or a file does not hold what it should.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder of published features. Received: {str(folder)!r}, which is none.")
    scores = _by_layer([file for pattern in SCORES for file in folder.rglob(pattern)], folder)
    values = [_by_layer(list(folder.rglob(name)), folder) for name in VALUES]
    if not scores:
        found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.pt"))[:8]
        raise ValueError(
            f"Expected mutual_information.pt or 'layer-L mi_expectation.pt' of a layer or more in {str(folder)!r}. "
            f"Received: {found}."
        )
    wanted: list[int | None] = [None] if len(layers) == 1 and list(scores) == [None] else list(layers)
    if missing := [layer for layer in wanted if layer not in scores]:
        known = sorted(layer for layer in scores if layer is not None)
        raise ValueError(f"{str(folder)!r} has the layers {known}. Received: layers {missing}, which are not there.")
    places = wanted or sorted(scores, key=lambda layer: -1 if layer is None else layer)
    read = [_read_layer(place, scores[place], [of_side.get(place) for of_side in values]) for place in places]
    return [one._replace(layer=layer) for one, layer in zip(read, layers, strict=True)] if layers else read


def _by_layer(files: Sequence[Path], folder: Path) -> dict[int | None, Path]:
    """Layer -> its file. The layer is named by the file or by the nearest folder that names one."""
    found: dict[int | None, Path] = {}
    for file in files:
        parts = (folder.absolute().name, *file.relative_to(folder).parts)
        named = (LAYER.search(part) for part in reversed(parts))
        layer = next((int(match[1]) for match in named if match), None)
        if layer in found:
            of_layer = "no layer's name" if layer is None else f"layer {layer}"
            raise ValueError(
                f"Expected the features of one model, a folder each layer. Received: {str(folder)!r} with two files "
                f"of {of_layer}, {str(found[layer].relative_to(folder))!r} and {str(file.relative_to(folder))!r}."
            )
        found[layer] = file
    return found


def _read_layer(layer: int | None, scores: Path, values: Sequence[Path | None]) -> PublishedFeatures:
    table = _tensors(scores)
    if not isinstance(table, dict) or not all(_is_row(table.get(name)) for name in SCORE_NAMES):
        held = sorted(map(str, table)) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"Expected {' and '.join(SCORE_NAMES)}, (d_sae,) each, in {scores}. Received: {held}.")
    there = [file for file in values if file is not None]
    if len(there) == 1:
        raise ValueError(f"Expected both of {' and '.join(VALUES)} of layer {layer}. Received: {there[0].name} alone.")
    rows = [_tensors(file) for file in there]
    for file, row in zip(there, rows, strict=True):
        if not _is_row(row):
            raise ValueError(f"Expected functional values (d_sae,) in {file}. Received: {type(row).__name__}.")
    sizes = {name: len(row) for name, row in {**table, **dict(zip(VALUES, rows, strict=False))}.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"Expected layer {layer}'s files to be of one SAE. Received: latents {sizes}.")
    mutual_information, expectation = (table[name] for name in SCORE_NAMES)
    return PublishedFeatures(layer, mutual_information, expectation, (rows[0], rows[1]) if rows else None)


def _tensors(file: Path) -> Any:
    """What a file of torch.save holds. The published expectation is a CUDA tensor."""
    try:
        return read_pickle(file)
    except ValueError as error:
        raise ValueError(
            f"Expected tensors written by torch.save, and nothing else. Received: {file}, which is no such file, or "
            f"one with code in it: {error}"
        ) from error


def _is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1
