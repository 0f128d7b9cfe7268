"""Cards of data that the library writes: hidden states, text spans, annotations of features. Read from manifests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from ..create_training_data.annotation.tables import read_feature_annotations
from .card_file import marked
from .citations import bibtex
from .facts import AuthorFacts, public_id, read_json
from .markdown import number, one_line, render, without_folders

HIDDEN_STATES = "sae_transformers hidden states"
SPANS = "sae_transformers text spans"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
         (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip


@dataclass(frozen=True)
class DatasetFacts:
    """What is in a folder of data.

    kind: `hidden states`, `spans` or `annotations`. facts: for a table, name -> text or number. table: file that
    `datasets` reads, if any. rows: of the table, or tokens. counts: label -> features, of annotations. settings: of
    the run, as they were written. columns: of the table, with what each holds.
    """

    kind: str
    folder: Path
    facts: Mapping[str, Any]
    rows: int
    model: str = ""
    table: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def is_dataset(folder: str | Path) -> bool:
    """Whether a folder holds data of one of the three kinds."""
    folder = Path(folder)
    return _is_store(folder) or (folder / "spans.json").is_file() or bool(_annotation_tables(folder))


def read_dataset(folder: str | Path) -> DatasetFacts:
    """What a folder holds, from its manifests.

    Raises:
        FileNotFoundError: none of the three kinds.
        ValueError: it is unfinished or broken, or holds several tables of annotations.
    """
    folder = Path(folder)
    if _is_store(folder):
        return _store(folder)
    if (folder / "spans.json").is_file():
        return _spans(folder)
    tables = _annotation_tables(folder)
    if len(tables) > 1:
        raise ValueError(
            f"A data set's folder must hold one table of annotations, as .parquet, .tsv or both. Received: "
            f"{sorted(tables)} in {str(folder)!r}; put each into a folder of its own."
        )
    if tables:
        return _annotations(folder, *tables.items())
    raise FileNotFoundError(
        f"Expected a folder that `harvest`, `spans`, `explain` or `judge` wrote. Received: {str(folder)!r}."
    )


def dataset_card(data: DatasetFacts, author: AuthorFacts | None = None) -> str:
    """A card, whole: every fact that is known and a line for each that is not."""
    author = author or AuthorFacts()
    name = author.repo_id or data.folder.resolve().name
    methods = [*author.methods, *(["selfreg"] if data.kind == "annotations" else [])]
    context = {
        "metadata": metadata(data, author).to_yaml(),
        "name": name,
        "data": data,
        "author": author,
        "command": without_folders(author.command),
        "citations": "\n\n".join(filter(None, [author.citation.strip(), bibtex(dict.fromkeys(methods))])),
    }
    return marked(render("dataset.md.jinja", context))


def metadata(data: DatasetFacts, author: AuthorFacts) -> DatasetCardData:
    """The block at the top of a card; `configs` is what lets `datasets` load the table."""
    extra: dict[str, Any] = {"tags": ["sparse-autoencoder", "interpretability", *map(one_line, author.tags)]}
    if data.table:
        extra["configs"] = [{"config_name": "default", "data_files": data.table}]
    if author.licence_name:
        extra |= {"license_name": one_line(author.licence_name), "license_link": one_line(author.licence_link)}
    size = next((label for limit, label in SIZES if data.rows < limit), "n>1B")
    return DatasetCardData(
        language=[one_line(one) for one in author.languages] or None,
        license=one_line(author.licence) or None,
        pretty_name=one_line(author.repo_id.split("/")[-1]) or None,
        size_categories=[size],
        source_datasets=[one_line(one) for one in author.datasets] or None,
        **extra,
    )


# -- the three kinds -------------------------------------------------------------------------------------------------


def _is_store(folder: Path) -> bool:
    path = folder / "index.json"
    if not path.is_file():
        return False
    index = read_json(path)
    return isinstance(index, Mapping) and index.get("format") == HIDDEN_STATES


def _store(folder: Path) -> DatasetFacts:
    index = read_json(folder / "index.json")
    if not (folder / "complete.json").is_file():
        raise ValueError(f"The harvest in {str(folder)!r} is not finished. Run it again; it goes on from there.")
    complete = read_json(folder / "complete.json")
    shards = sorted(path for path in folder.iterdir() if path.name.startswith("shard-"))
    if len(shards) != len(complete["shards"]):
        raise ValueError(
            f"The harvest in {str(folder)!r} must have {len(complete['shards'])} shards. Received: {len(shards)}."
        )
    settings = dict(index.get("settings", {}))
    places = "; ".join(f"{place} ({width})" for place, width in index["places"].items())
    facts = {
        "model": _name(index.get("model")),
        "revision": index.get("revision") or "not known",
        "places (width)": places,
        "tokens": complete["n_tokens"],
        "number type": index["dtype"],
        "labels of each token": ", ".join(index.get("labels", ())) or "none",
        "text": _source(settings),
        "shards": len(shards),
        "bytes": sum(path.stat().st_size for path in shards),
    }
    columns = {place: f"({width},) {index['dtype']}, the hidden state" for place, width in index["places"].items()}
    columns |= {"token": "int32, id", "position": "int32, in its sequence", "row": "int64, of the text"}
    if index.get("labels"):
        columns["labels"] = f"({len(index['labels'])},) float32, -100 where unknown"
    return DatasetFacts(
        "hidden states", folder, facts, int(complete["n_tokens"]), public_id(index.get("model")), "", columns,
        settings=_flat(settings),
    )  # fmt: skip


def _spans(folder: Path) -> DatasetFacts:
    import pyarrow.parquet

    found = read_json(folder / "spans.json")
    work = folder / "work" / "index.json"
    index = read_json(work) if work.is_file() else {}
    if not (folder / "spans.parquet").is_file():
        raise ValueError(f"{str(folder)!r} must hold spans.parquet. Received: none; run `spans` again.")
    table = pyarrow.parquet.ParquetFile(folder / "spans.parquet")
    features = len(pyarrow.parquet.read_table(folder / "spans.parquet", columns=["feature"])["feature"].unique())
    settings = dict(index.get("settings", {}))
    facts = {
        "place": index.get("place", "not known"),
        "features of the SAE": found["d_sae"],
        "features with spans": features,
        "spans": table.metadata.num_rows,
        "texts": found["n_texts"],
        "tokens": found["n_tokens"],
        "text": _source({"source": index.get("source", {})}),
    }
    columns = {
        "feature": "of the SAE",
        "text_id": "row of the text",
        "score": "largest activation there",
        "position": "token of the maximum",
        "start, end": "characters of the span in its text",
        "span": "the span",
    }
    return DatasetFacts(
        "spans", folder, facts, table.metadata.num_rows, "", "spans.parquet", columns, settings=_flat(settings)
    )


def _annotations(folder: Path, table: tuple[str, Path]) -> DatasetFacts:
    stem, path = table
    rows = read_feature_annotations(path)
    with_meaning = [row for row in rows.values() if row.meaning]
    facts = {
        "features": len(rows),
        "with spans": sum(row.has_spans for row in rows.values()),
        "with a meaning": len(with_meaning),
        "without an answer": sum(row.failed for row in rows.values()),
    }
    counts = {
        name: dict(Counter(label for row in rows.values() if (label := getattr(row, field_))).most_common(20))
        for name, field_ in (("second look at the meaning", "verified"), ("judgement of the task", "judged"))
    }
    columns = {
        "FeatureID": "of the SAE",
        "Task": "label|||full answer, where a task was judged",
        "Verify": "label of the second look",
        "Summary": "the meaning",
        "Words": "the spans it was read from",
        "Failure": "why there is no answer; empty if there is one",
    }
    return DatasetFacts(
        "annotations", folder, facts, len(rows), "", path.name, columns,
        {name: found for name, found in counts.items() if found},
    )  # fmt: skip


def _annotation_tables(folder: Path) -> dict[str, Path]:
    """Tables of annotations by name without ending; of both forms the Parquet one, which loses nothing."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.tsv")) + sorted(folder.glob("*.parquet")):
        if _columns(path) >= {"FeatureID", "Words", "Summary"}:
            found[path.stem] = path
    judged = {name: path for name, path in found.items() if "Task" in _columns(path)}
    return judged if len(judged) == 1 else found  # which holds all that its explanations hold


def _columns(path: Path) -> set[str]:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return set(pyarrow.parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowException):
            return set()
    with path.open(encoding="utf-8", errors="replace") as file:
        return set(file.readline().rstrip("\r\n").split("\t"))


def _source(settings: Mapping[str, Any]) -> str:
    source = settings.get("source") or {}
    named = without_folders(str(source.get("text", ""))) if isinstance(source, Mapping) else ""
    parts = [f"{key} {source[key]}" for key in ("subset", "split", "revision") if source.get(key)] if named else []
    if named and source.get("rows"):
        parts.append(f"{number(source['rows'])} rows")
    return ", ".join([named, *parts]) if named else "not known"


def _name(model: Any) -> str:
    return without_folders(str(model)) if model else "not known"


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as texts; what stands elsewhere on the card is left out."""
    return {key: str(value) for key, value in settings.items() if key != "source" and value is not None}
