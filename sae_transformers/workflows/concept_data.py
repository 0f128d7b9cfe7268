"""Texts with a concept's label, by the rules of SCAR, as a file that `harvest` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..create_training_data.scar_sources import UNKNOWN, concept_dataset, load_concept, scored, shakespeare
from ..latents.output_files import whole_file
from ..latents.text_files import write_csv
from ..latents.texts import open_text
from .results import Result
from .settings.concept_set import SOURCES, ConceptDataSettings


def _to_csv(data: Dataset, path: str) -> None:
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        write_csv(file, [data.column_names, *(row.values() for row in data.to_list())])


FORMATS = {".jsonl": Dataset.to_json, ".csv": _to_csv, ".parquet": Dataset.to_parquet}


@dataclass(frozen=True)
class ConceptDataResult(Result):
    """data: columns `text` and the concept's, 1, 0, or -100 where nobody knows. concept: its name."""

    data: Dataset
    concept: str
    settings: ConceptDataSettings = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """A row per text."""
        return self.data.to_list()

    def summary(self) -> list[str]:
        """How many texts have the concept, do not, and are unknown."""
        labels = self.data[self.concept][:]
        counts = {name: labels.count(value) for name, value in (("with", 1), ("without", 0), ("unknown", -100))}
        told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        return [f"{self.concept}: {len(labels):,} texts, {told}"]

    def save(self, path: str | Path) -> None:
        """Write the rows as .jsonl, .csv or .parquet, whole or not at all.

        Raises:
            ValueError: another suffix.
        """
        write = FORMATS.get(Path(path).suffix)
        if write is None:
            raise ValueError(f"`out` must end in {', '.join(FORMATS)}. Received: out={str(path)!r}.")
        with whole_file(path) as draft:
            write(self.data, str(draft))


def concept_data(
    source: str, files: str | Sequence[str] | None = None, settings: ConceptDataSettings | None = None
) -> ConceptDataResult:
    """Texts and their label from one of SCAR's sources (https://huggingface.co/papers/2411.07122), or any table.

    Args:
        source: real_toxicity_prompts (label of prompt and continuation), real_toxicity_prompts_prompt_only, aegis,
            toxic_chat, wikitext (unknown), shakespeare, or table.
        files: files or Hub data sets with the source's columns, by default the source's own on the Hub; of
            shakespeare two files, original and modern; of a table its files.

    Raises:
        ValueError: an unknown source, a column that is not there, or a label that cannot be read; it names the row.
        OSError: a file or data set is not there.
    """
    settings = settings or ConceptDataSettings()
    given = [files] if isinstance(files, str) else list(files or ())
    if source not in SOURCES:
        raise ValueError(f"`source` must be one of {', '.join(SOURCES)}. Received: source={source!r}.")
    if source == "table":
        if not given:
            raise ValueError("A table is read from `files`. Received: none.")
        rows = (row for name in given for row in open_text(name, split=settings.split).rows())
        pairs = scored(rows, settings.text_column, settings.label_column, threshold=settings.threshold)
        name = settings.concept or settings.label_column.rpartition(".")[2]
        data = concept_dataset(pairs, name)
    elif source == "shakespeare":
        if len(given) != 2:
            raise ValueError(f"Shakespeare needs two `files`, original and modern. Received: {len(given)}.")
        original, modern = (Path(name).read_text(encoding="utf-8").splitlines() for name in given)
        name = settings.concept or "shakespeare"
        data = concept_dataset(shakespeare(original, modern), name)
    else:
        drawn = {"n_rows": settings.max_rows, "seed": settings.seed} if source == "wikitext" else {}
        data = load_concept(source, given or None, split=settings.split, concept=settings.concept, **drawn)
        name = data.column_names[1]
    if taken := {name, "text"} & set(settings.others):
        raise ValueError(f"`others` must be other names than {name!r} and 'text'. Received: {sorted(taken)[0]!r}.")
    for other in settings.others:
        data = data.add_column(other, [UNKNOWN] * len(data))  # pyright: ignore[reportCallIssue]
    return ConceptDataResult(data, name, settings)
