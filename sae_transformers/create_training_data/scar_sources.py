"""Texts with concept labels from SCAR's sources (https://huggingface.co/papers/2411.07122), by its rules.

A rule maps rows, mappings with the columns of the published data set, to pairs of a text and its label: 1 where the
concept is present, 0 where it is not, -100 where nobody knows. `concept_dataset` makes a data set of pairs.

    rows = read_rows("allenai/real-toxicity-prompts")
    data = concept_dataset(real_toxicity_prompts(rows), "toxicity")
    data = load_concept("real_toxicity_prompts")  # the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from datasets import Dataset

from ..latents.texts import open_text, value_at

UNKNOWN = -100
AEGIS_ANNOTATORS = 5
Pairs = Iterator[tuple[str, int]]
Rows = Iterable[Mapping[str, Any]] | Dataset


def real_toxicity_prompts(rows: Rows, *, prompt_only: bool = False) -> Pairs:
    """RealToxicityPrompts: 1 where the mean toxicity of prompt and continuation is 0.5 or more.

    Of two scores the one that is there counts; where neither is, the label is 0.

    Args:
        rows: with `prompt` and `continuation`, each a mapping with `text` and `toxicity` (0 to 1 or None).
        prompt_only: the text is the prompt and the label its score's, without the continuation.
    """
    parts = ("prompt",) if prompt_only else ("prompt", "continuation")
    for number, row in _numbered(rows):
        pieces = [_column(row, part, number, Mapping) for part in parts]
        scores = [_score(piece, number) for piece in pieces]
        known = [score for score in scores if score is not None]
        yield "".join(_column(p, "text", number, str) for p in pieces), int(sum(known) >= 0.5 * max(len(known), 1))


def aegis(rows: Rows) -> Pairs:
    """Aegis content safety: 1 where more than half of the annotators chose anything but "Safe".

    Args:
        rows: with `text`, `num_annotations` and one column `labels_0`, `labels_1`, ... for each annotation.
    """
    for number, row in _numbered(rows):
        count = _integer(_column(row, "num_annotations", number), "num_annotations", number)
        if not 1 <= count <= AEGIS_ANNOTATORS:
            raise ValueError(
                f"A row has 1 to {AEGIS_ANNOTATORS} annotations. Received: num_annotations={count} in row {number}."
            )
        unsafe = sum(_column(row, f"labels_{i}", number) != "Safe" for i in range(count))
        yield _column(row, "text", number, str), int(unsafe > count / 2)


def toxic_chat(rows: Rows) -> Pairs:
    """ToxicChat: the user's message (`user_input`, or `text` where there is none) with its human label `toxicity`."""
    for number, row in _numbered(rows):
        label = _integer(_column(row, "toxicity", number), "toxicity", number)
        if label not in (0, 1):
            raise ValueError(f"Labels must be 0 or 1. Received: toxicity={label} in row {number}.")
        yield _column(row, "user_input" if "user_input" in row else "text", number, str), label


def unlabelled(rows: Rows, *, n_rows: int | None = None, seed: int = 42) -> Pairs:
    """Rows of wikitext, or of any other text, with the label unknown: those not empty, shuffled, the first `n_rows`.

    SCAR takes 100,000 or 30,000 rows of wikitext-103 and labels them -1, which its loss reads as 0. Here they are
    -100, which no loss counts; `conditioning_legacy` reads it as SCAR does.
    """
    texts = [text for number, row in _numbered(rows) if (text := _column(row, "text", number, str)).strip()]
    if n_rows is not None and not 1 <= n_rows <= len(texts):
        raise ValueError(f"`n_rows` must be in [1, {len(texts)}], the rows with text. Received: n_rows={n_rows!r}.")
    for row in Dataset.from_dict({"text": texts}).shuffle(seed).select(range(n_rows or len(texts))):
        yield row["text"], UNKNOWN  # pyright: ignore[reportCallIssue, reportArgumentType]


def shakespeare(original: Iterable[str], modern: Iterable[str]) -> Pairs:
    """Sentences of Shakespeare, 1, and the same in modern English, 0.

    Args:
        original, modern: lines of `train.original.nltktok` and `train.modern.nltktok` of
            https://github.com/harsh19/Shakespearizing-Modern-English.
    """
    yield from ((line.strip(), 0) for line in modern)
    yield from ((line.strip(), 1) for line in original)


def scored(rows: Rows, text_column: str, label_column: str, *, threshold: float = 0.5) -> Pairs:
    """Any table: 1 where the score is `threshold` or more, 0 where it is less, unknown where there is none.

    Args:
        text_column, label_column: `a.b` is field b of column a.
    """
    for number, row in _numbered(rows):
        text, score = (value_at(row, name, number) for name in (text_column, label_column))
        if not isinstance(text, str):
            raise ValueError(f"{text_column!r} must be a str. Received: {type(text).__name__} in row {number}.")
        if score is None or score == "":
            yield text, UNKNOWN
            continue
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if math.isnan(value):
            raise ValueError(f"A label must be a number. Received: {label_column}={score!r} in row {number}.")
        yield text, UNKNOWN if value == UNKNOWN else int(value >= threshold)


class ConceptSource(NamedTuple):
    """A data set of the Hub, its configuration, the name of its concept, and the rule for its rows."""

    dataset: str
    configuration: str | None
    concept: str
    rule: Callable[..., Pairs]


def _prompts_alone(rows: Rows) -> Pairs:
    return real_toxicity_prompts(rows, prompt_only=True)


SOURCES = {
    "real_toxicity_prompts": ConceptSource("allenai/real-toxicity-prompts", None, "toxicity", real_toxicity_prompts),
    "real_toxicity_prompts_prompt_only": ConceptSource(
        "allenai/real-toxicity-prompts", None, "toxicity", _prompts_alone
    ),
    "aegis": ConceptSource("nvidia/Aegis-AI-Content-Safety-Dataset-1.0", None, "unsafe", aegis),
    "toxic_chat": ConceptSource("lmsys/toxic-chat", "toxicchat0124", "toxicity", toxic_chat),
    "wikitext": ConceptSource("Salesforce/wikitext", "wikitext-103-raw-v1", "toxicity", unlabelled),
}


def load_concept(
    name: str,
    source: str | Sequence[str] | None = None,
    *,
    split: str = "train",
    concept: str | None = None,
    **options: Any,
) -> Dataset:
    """One of SCAR's sources as a data set.

    Args:
        name: a key of `SOURCES`. Shakespeare is no data set of the Hub: see `shakespeare`.
        source: files or another data set of the Hub with the same columns; see `read_rows`.
        split: of a data set of the Hub.
        concept: name of the label's column, the source's own by default.
        options: of the rule: `n_rows` and `seed` of wikitext.

    Returns:
        columns `text` and the concept's.

    Raises:
        ValueError: the name is unknown, a column is missing, or a value cannot be read.
        OSError: a source cannot be found or read.
    """
    if name not in SOURCES:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, SOURCES))}. Received: name={name!r}.")
    known = SOURCES[name]
    if source is None:
        rows = read_rows(known.dataset, configuration=known.configuration, split=split)
    else:
        sources = [source] if isinstance(source, str) else source
        rows = chain.from_iterable(read_rows(each, split=split) for each in sources)
    return concept_dataset(known.rule(rows, **options), concept or known.concept)


def read_rows(source: str, *, configuration: str | None = None, split: str = "train") -> Rows:
    """The rows of a data set of the Hub, a file, a folder or a glob of files, as `open_text` finds them."""
    return open_text(source, subset=configuration, split=split).rows()


def concept_dataset(pairs: Iterable[tuple[str, int]], concept: str) -> Dataset:
    """Pairs of text and label as a data set with columns `text` and `concept`; empty texts are left out.

    Raises:
        ValueError: there is no text, or the concept is named like the text's column.
    """
    if concept == "text" or not concept:
        raise ValueError(f"`concept` must be a name other than 'text'. Received: concept={concept!r}.")
    kept = [(text, label) for text, label in pairs if text.strip()]
    if not kept:
        raise ValueError(f"Expected a text for {concept!r}, and there is none. Received: no rows or only empty ones.")
    return Dataset.from_dict({"text": [text for text, _ in kept], concept: [label for _, label in kept]})


def combine_concepts(parts: Sequence[Dataset], *, seed: int = 42) -> Dataset:
    """Data sets of several concepts as one, shuffled; a concept that a part knows nothing of is -100 there."""
    if not parts:
        raise ValueError("`parts` must hold a data set or more. Received: parts=[].")
    columns = list(dict.fromkeys(name for part in parts for name in part.column_names))
    merged: dict[str, list] = {name: [] for name in columns}
    for part in parts:
        for name, values in merged.items():
            values.extend(part[name] if name in part.column_names else [UNKNOWN] * len(part))
    return Dataset.from_dict(merged).shuffle(seed)


def _numbered(rows: Rows) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return enumerate(rows, 1)  # pyright: ignore[reportReturnType]


def _column(row: Mapping[str, Any], name: str, number: int, kind: type = object) -> Any:
    if name not in row:
        raise ValueError(f"Row {number} has no {name!r}. Received: columns {', '.join(map(repr, row)) or 'none'}.")
    if not isinstance(row[name], kind):
        raise ValueError(f"{name!r} must be a {kind.__name__}. Received: {type(row[name]).__name__} in row {number}.")
    return row[name]


def _score(piece: Mapping[str, Any], number: int) -> float | None:
    score = _column(piece, "toxicity", number)
    if score is None:
        return None
    if not isinstance(score, (int, float)) or not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(f"A toxicity score is in [0, 1] or None. Received: toxicity={score!r} in row {number}.")
    return float(score)


def _integer(value: Any, name: str, number: int) -> int:
    try:
        if float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"`{name}` must be a whole number. Received: {name}={value!r} in row {number}.")
