"""Annotations of features from any of the places that have some, and beside an SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME

from ...create_training_data.annotation.sources.delphi import is_delphi, read_delphi
from ...create_training_data.annotation.sources.download import fetch_source, is_neuronpedia_id
from ...create_training_data.annotation.sources.neuronpedia import is_neuronpedia, read_neuronpedia
from ...create_training_data.annotation.tables import AnnotationRow, read_annotations
from ...create_training_data.harvest.store import Store
from ...create_training_data.spans.collect import read_maxima
from ...create_training_data.spans.files import read_table
from ...evaluation.features.table import FeatureTable
from ...evaluation.features.table_files import read_feature_table
from ...latents.annotations.columns import Columns
from ...latents.annotations.table import FeatureAnnotations
from ...latents.text_latents import sae_of
from ...modeling import SparseAutoencoder
from ...modeling.conversion.saelens import published_sparsity
from ...modeling.modeling_sae import SaePreTrainedModel
from ...modeling.plain_files import read_json
from ...modeling.sae_files import FORMAT
from ...modeling.stored_annotations import StoredAnnotations, annotations_file
from ..loading import load, load_sae
from ..results import Progress
from .embedding import Embedder, embedded

Source = str | Path | FeatureAnnotations | FeatureTable | Sequence[AnnotationRow] | Sequence[Mapping[str, Any]]
READ = (
    "annotations.parquet of ours or a folder with it; tables of `explain` and `judge`; folders of `spans` and "
    "`feature_table`; Neuronpedia's explanations/, features/ and activations/, its .jsonl and .json with .gz or "
    "without, its ids modelId/source; folders of delphi's runs"
)


def open_annotations(
    source: Source,
    *,
    n_features: int | None = None,
    module: str | None = None,
    store: str | None = None,
    progress: Progress | None = None,
) -> FeatureAnnotations:
    """What is known of features, from a file, a folder, Neuronpedia's store by an id, or results in memory.

    All that a file says is taken as text, whatever it holds. What is read: a saved SAE's `annotations.parquet`, or the
    folder with it; tables of `explain` and `judge`, rows of them, folders of `spans` (maxima) and of `feature_table`
    (frequencies), a `FeatureTable`; Neuronpedia's bulk folders and JSON; delphi's runs; mappings, see
    `FeatureAnnotations.from_rows`.

    Args:
        source: a path, a Neuronpedia id such as `gemma-3-270m/12-gemmascope-2-res-16k`, or what is known already.
        n_features: latents of the SAE; a row of another is an error.
        module: of a delphi run with several.
        store: address of Neuronpedia's store, in place of its own.
        progress: called with (files done, files).

    Raises:
        ValueError: a file holds something else; the message names file and row.
        OSError: there is nothing of that name, or the store cannot be reached.
    """
    if isinstance(source, FeatureAnnotations):
        return source
    if isinstance(source, FeatureTable):
        return _of_table(source, n_features, "a feature table")
    if not isinstance(source, (str, Path)):
        rows = list(source)
        if rows and isinstance(rows[0], AnnotationRow):
            return _of_explanations(rows, n_features, "explanations")  # pyright: ignore[reportArgumentType]
        return FeatureAnnotations.from_rows(rows, n_features=n_features)  # pyright: ignore[reportArgumentType]
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, n_features, module, progress)
    if path.is_file():
        return _of_file(path, n_features)
    name = str(source)
    if is_neuronpedia_id(name):
        folder = fetch_source(name, store=store, progress=progress)
        return read_neuronpedia(folder, n_features=n_features)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):  # a repository on the Hub
        stored = StoredAnnotations(name).path()
        if stored is not None:
            return _checked(FeatureAnnotations.load(stored), n_features)
    raise FileNotFoundError(f"Expected annotations: {READ}. Received: {str(source)!r}, which is not there.")


def annotate(
    model: SaePreTrainedModel | SparseAutoencoder,
    source: Source | Sequence[Source] | None = None,
    *,
    sae: int = 0,
    module: str | None = None,
    store: str | None = None,
    embedder: Embedder | None = None,
    progress: Progress | None = None,
) -> FeatureAnnotations:
    """Put what is known of features beside an SAE: its `annotations`, and the maxima that it does not know itself.

    From then on features are shown with their descriptions, `find` searches them, and a whole description names its
    feature. `save_pretrained` of the model or the SAE keeps them, in `annotations.parquet`.

    Args:
        model: a model with SAEs, or an SAE.
        source: see `open_annotations`; of several the later ones add to the first. By default the SAE's own
            `neuronpedia_id`, and the frequencies published beside its weights.
        sae: number of the model's SAE.
        module: of a delphi run with several.
        store: address of Neuronpedia's store, in place of its own.
        embedder: makes embeddings of the descriptions, for `find`: see there. It takes minutes on a CPU.
        progress: called with (files done, files), then (descriptions done, descriptions).

    Raises:
        ValueError: they are of another SAE, or a file holds something else.
        OSError: there is nothing of that name, or the store cannot be reached.
    """
    one = model if isinstance(model, SparseAutoencoder) else sae_of(model, sae)
    options: dict[str, Any] = {"module": module, "store": store, "progress": progress}
    found = [
        open_annotations(each, n_features=one.config.d_sae, **options)
        for each in (_own_sources(one) if source is None else _several(source))
    ]
    notes = found[0]
    for other in found[1:]:
        notes = notes.joined(other)
    if embedder is not None:
        notes = embedded(notes, embedder, progress)
    notes.fill_maxima(one)
    one.annotations = notes
    return notes


def annotate_folder(
    name: str,
    source: Source | Sequence[Source] | None = None,
    *,
    out: str | Path | None = None,
    number: int = 0,
    **options: Any,
) -> list[str]:
    """`annotate` for a saved model or SAE, which is saved again; what was done, in lines.

    Args:
        name: a folder of a model with SAEs, or an SAE as `load_sae` takes it.
        out: folder to save to, by default the one it is in.
        number: of a model's SAE.
        options: see `annotate`.

    Raises:
        ValueError: an SAE that is not of a folder of this library's, without `out`.
    """
    config = Path(name, CONFIG_NAME)
    values = read_json(config) if config.is_file() else {}
    ours = isinstance(values, dict) and (values.get("format") == FORMAT or "saes" in values)
    if out is None and not ours:
        raise ValueError(f"`out` is needed: {name!r} is no folder that this library saved. Received: out=None.")
    folder = Path(name if out is None else out)
    model = load(name).model if "saes" in values else load_sae(name)
    notes = annotate(model, source, sae=number, **options)
    model.save_pretrained(folder)
    file = folder / annotations_file(number if "saes" in values else 0)
    return [*notes.summary(), f"{file}: {file.stat().st_size / 1e6:.1f} MB"]


def searched(source: str, number: int | None = None) -> FeatureAnnotations | SparseAutoencoder:
    """What the command line searches: annotations, without the model that they may be beside.

    Args:
        source: see `open_annotations`.
        number: of the SAE in a model's folder, by default 0.
    """
    beside = Path(source) / annotations_file(number or 0)
    return open_annotations(beside if beside.is_file() else source)


def _several(source: Any) -> list[Any]:
    if isinstance(source, (str, Path, FeatureAnnotations, FeatureTable)):
        return [source]
    parts = list(source)
    return [parts] if all(isinstance(part, (AnnotationRow, Mapping)) for part in parts) else parts


def _own_sources(sae: SparseAutoencoder) -> list[Source]:
    name = sae.config.metadata.get("neuronpedia_id")
    sparsity = published_sparsity(sae.config)
    if not isinstance(name, str) and sparsity is None:
        raise ValueError(
            f"The SAE names no annotations of its own. Expected `source`: {READ}. Received: metadata without "
            f"`neuronpedia_id`."
        )
    found: list[Source] = [name] if isinstance(name, str) else []
    if sparsity is not None:
        found.append([{"feature": n, "frequency": 10.0**value} for n, value in enumerate(sparsity.values.tolist())])
    return found


def _of_folder(
    path: Path, n_features: int | None, module: str | None, progress: Progress | None
) -> FeatureAnnotations:
    if (path / annotations_file()).is_file():
        return _checked(FeatureAnnotations.load(path / annotations_file()), n_features)
    if (path / "spans.parquet").is_file():
        return _of_spans(path, n_features)
    if (path / "features.parquet").is_file():
        return _of_table(read_feature_table(path), n_features, path.name)
    if is_delphi(path):
        return read_delphi(path, module=module, n_features=n_features, progress=progress)
    if is_neuronpedia(path) or any(path.glob("batch-*.json")):
        return read_neuronpedia(path, n_features=n_features, progress=progress)
    raise ValueError(f"Expected annotations: {READ}. Received: the folder {str(path)!r} with none of these.")


def _of_file(path: Path, n_features: int | None) -> FeatureAnnotations:
    name = path.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        return read_neuronpedia(path, n_features=n_features)
    if name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            names = pyarrow.parquet.read_schema(path).names
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{path} is no Parquet file: {error}") from error
        if "FeatureID" not in names:
            return _checked(FeatureAnnotations.load(path), n_features)
    elif not name.endswith(".tsv"):
        raise ValueError(f"Expected annotations: {READ}. Received: the file {str(path)!r}.")
    return _of_explanations(read_annotations(path), n_features, path.name)


def _checked(notes: FeatureAnnotations, n_features: int | None) -> FeatureAnnotations:
    if n_features is not None and len(notes) > n_features:
        raise ValueError(
            f"The annotations are of an SAE with {len(notes):,} latents. Expected those of one with {n_features:,}."
        )
    return notes


def _of_explanations(rows: Sequence[AnnotationRow], n_features: int | None, name: str) -> FeatureAnnotations:
    columns = Columns(n_features)
    for number, row in enumerate(rows):
        where = f"{name}, row {number}"
        feature = columns.feature(row.feature_id, where)
        if row.has_summary:
            columns.describe(feature, row.summary, where, method="explain")
    return FeatureAnnotations.from_columns(columns, {"source": f"explain, {name}"})


def _of_table(table: FeatureTable, n_features: int | None, name: str) -> FeatureAnnotations:
    columns = Columns(n_features)
    sparsity = torch.full((len(table),), float("nan")) if table.sparsity is None else table.sparsity
    frequencies = torch.where(sparsity > -9.5, 10.0**sparsity, torch.zeros_like(sparsity))
    frequencies = torch.where(sparsity.isnan(), sparsity, frequencies)
    explained = table.notes.get("explanation", [""] * len(table))
    for number, (frequency, text) in enumerate(zip(frequencies.tolist(), explained, strict=True)):
        where = f"{name}, feature {number}"
        columns.set(columns.feature(number, where), "frequency", frequency, where)
        columns.describe(number, text, where)
    return FeatureAnnotations.from_columns(columns, {"source": f"feature table, {name}"})


def _of_spans(path: Path, n_features: int | None) -> FeatureAnnotations:
    columns = Columns(n_features)

    maxima = read_maxima(Store(f"{path}/work"))
    if maxima is None:  # a copy without the state of the run: the spans' own scores, whatever activation they are of
        table = read_table(path / "spans.parquet")
        maxima = torch.zeros(int(table["feature"].max()) + 1 if len(table["feature"]) else 0)
        maxima.scatter_reduce_(0, table["feature"], table["score"].abs(), "amax")
    for number, value in enumerate(maxima.tolist()):
        where = f"{path.name}, feature {number}"
        feature = columns.feature(number, where)
        if value > 0:
            columns.set(feature, "maximum", value, where)
    return FeatureAnnotations.from_columns(columns, {"source": f"spans, {path.name}"})
