"""Texts that show a concept, texts that do not, and texts that nearly do, as files.

AxBench's layout (https://huggingface.co/papers/2501.17148) is read and written: `train.parquet` with instruction,
answer and concept, the answers without a concept shared by all; `detection_eval.parquet` with positive, negative and
hard negative answers of each; `metadata.jsonl` with the concepts. `concept_making` has a chat model write such sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..latents.labelled_texts import read_labelled_texts
from .harvest.store import Store

POSITIVE, NEGATIVE, HARD = "positive", "negative", "hard negative"
COLUMNS = ("input", "output", "output_concept", "concept_genre", "category", "dataset_category", "concept_id")
FILES = ("train.parquet", "detection_eval.parquet", "metadata.jsonl")
NO_CONCEPT = -1


class Example(NamedTuple):
    """An instruction (may be empty) and a text that answers it."""

    instruction: str
    text: str


@dataclass(frozen=True)
class ConceptSet:
    """Examples for one concept.

    concept: in words. train, test: category (`positive`, `negative`, `hard negative`) -> examples. genre: `text`,
    `code`, `math` or what a file says. steering_instructions: asked of a model that is steered; in no other part.
    """

    concept: str
    train: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    genre: str = "text"
    steering_instructions: Sequence[str] = ()

    def labelled(self, part: str = "train") -> tuple[list[Example], list[int]]:
        """All examples of a part, and 1 for the positive ones.

        Raises:
            ValueError: the part has no positive or no negative examples.
        """
        if part not in ("train", "test"):
            raise ValueError(f"`part` must be train or test. Received: part={part!r}.")
        found: Mapping[str, Sequence[Example]] = getattr(self, part)
        positive = list(found.get(POSITIVE, ()))
        others = [example for name, examples in found.items() if name != POSITIVE for example in examples]
        if not positive or not others:
            raise ValueError(
                f"Part {part} of {self.concept!r} needs texts with and without the concept. "
                f"Received: {len(positive)} with, {len(others)} without."
            )
        return [*positive, *others], [1] * len(positive) + [0] * len(others)


# -- files -----------------------------------------------------------------------------------------------------------


def read_concept_sets(
    source: str | Path, *, text_column: str = "text", label_column: str = "label"
) -> list[ConceptSet]:
    """Concept sets of a folder in AxBench's layout, or one of a table with a text and a label of 0 or 1.

    Raises:
        ValueError: a file or column is missing, a label is unknown, or a concept has no positive or negative texts.
        OSError: the source cannot be found.
    """
    folder = Path(source)
    if folder.is_dir() and (folder / FILES[0]).exists():
        return _read_axbench(folder)
    data = read_labelled_texts(str(source), text_column, label_column)
    parts = {name: [Example("", t) for t, y in zip(data.texts, data.labels, strict=True) if y == value]
             for name, value in ((POSITIVE, 1), (NEGATIVE, 0))}  # fmt: skip
    return [ConceptSet(folder.stem, parts)]


def _read_axbench(folder: Path) -> list[ConceptSet]:
    train = _read_parquet(folder / FILES[0])
    test = _read_parquet(folder / FILES[1]) if (folder / FILES[1]).exists() else []
    told = {}
    if (folder / FILES[2]).exists():
        lines = (folder / FILES[2]).read_text(encoding="utf-8").splitlines()
        told = {int(row["concept_id"]): row for row in map(json.loads, filter(None, lines))}
    shared = [Example(row["input"], row["output"]) for row in train if row["concept_id"] == NO_CONCEPT]
    sets = []
    for number in sorted({int(row["concept_id"]) for row in train} - {NO_CONCEPT}):
        own = [row for row in train if row["concept_id"] == number]
        parts = {HARD: [], POSITIVE: []}
        for row in own:
            parts.setdefault(row["category"], []).append(Example(row["input"], row["output"]))
        parts[NEGATIVE] = [*shared, *parts.get(NEGATIVE, [])]
        held: dict[str, list[Example]] = {}
        for row in test:
            if row["concept_id"] == number:
                held.setdefault(row["category"], []).append(Example(row["input"], row["output"]))
        name = told.get(number, {}).get("concept", own[0]["output_concept"])
        instructions = told.get(number, {}).get("steering_instructions", ())
        made = ConceptSet(name, {k: v for k, v in parts.items() if v}, held, own[0]["concept_genre"], instructions)
        made.labelled()
        sets.append(made)
    if not sets:
        raise ValueError(f"There is no concept in {str(folder / FILES[0])!r}. Received: {len(train)} rows.")
    return sets


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    needed = set(COLUMNS) - {"dataset_category"}
    if rows and (missing := sorted(needed - set(rows[0]))):
        raise ValueError(f"{path.name} needs the columns {', '.join(COLUMNS)}. Received: none of {missing}.")
    return rows


def write_concept_sets(sets: Sequence[ConceptSet], folder: str | Path) -> list[Path]:
    """Write AxBench's layout; `metadata.jsonl`, which names the others, comes last.

    Negative training texts that several concepts have are written once, as shared ones.
    """
    import pyarrow
    import pyarrow.parquet

    tables: dict[str, list[dict[str, Any]]] = {FILES[0]: [], FILES[1]: []}
    shared = dict.fromkeys(example for one in sets for example in one.train.get(NEGATIVE, ()))
    tables[FILES[0]] = [_row(example, "", "text", NEGATIVE, NO_CONCEPT) for example in shared]
    for number, one in enumerate(sets):
        for name, part in zip(FILES, (one.train, one.test), strict=False):
            tables[name] += [
                _row(example, one.concept, one.genre, category, number)
                for category, examples in part.items()
                for example in examples
                if not (part is one.train and category == NEGATIVE)
            ]
    facts = [
        {
            "concept_id": number,
            "concept": one.concept,
            "concept_genres_map": {one.concept: [one.genre]},
            "steering_instructions": list(one.steering_instructions),
        }
        for number, one in enumerate(sets)
    ]
    store = Store(folder)
    for name, rows in tables.items():
        columns = {column: [row[column] for row in rows] for column in COLUMNS}
        store.put(name, lambda path, columns=columns: pyarrow.parquet.write_table(pyarrow.table(columns), path))
    lines = "".join(json.dumps(fact) + "\n" for fact in facts)
    store.put(FILES[2], lambda path: path.write_text(lines, encoding="utf-8"))
    return [Path(folder) / name for name in FILES]


def _row(example: Example, concept: str, genre: str, category: str, number: int) -> dict[str, Any]:
    values = (example.instruction, example.text, concept, genre, category, "instruction", number)
    return dict(zip(COLUMNS, values, strict=True))
