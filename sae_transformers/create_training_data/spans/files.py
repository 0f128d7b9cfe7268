"""Text spans as files: a parquet table, and the two tab-separated tables of the original implementation.

spans.parquet   feature, text_id, score, position, start, end, span: exact
spans.tsv       NeuronID TextID Score Span: a line a span, best first within a latent
features.tsv    FeatureID Words: a line a latent, `Span 1: ...\\nSpan 2: ...`, empty where it has none

In the tables a line break is written as backslash n, a tab as backslash t, a carriage return as backslash r and a
backslash twice. The original does not mark a backslash: one before another character is read as it is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fsspec.core import url_to_fs
from torch import Tensor

from ..annotation.tables import escape, unescape

COLUMNS = ("feature", "text_id", "score", "position", "start", "end")
DTYPES = (torch.int64, torch.int64, torch.float32, torch.int32, torch.int64, torch.int64)


class TextSpan(NamedTuple):
    """text_id: number of the row of text. score: the latent's maximum there. span: a stretch of the text."""

    text_id: int
    score: float
    span: str


@dataclass(frozen=True, eq=False)
class Spans:
    """The strongest spans of every latent, by latent and then best first; n entries.

    feature, text_id: (n,) int64. score: (n,) float32. position: (n,) int32, token of the maximum, counted from the
    text's first. start, end: (n,) int64, characters of the span in its text. span: n texts.
    d_sae: latents. n_texts, n_tokens: texts with tokens that count, and those tokens.
    complete: False where other processes are still at work; then there are no entries.
    feature_max: (d_sae,) float32, the largest magnitude of each latent's own activation on the tokens that count; None
        where that is not known: not complete, or begun by a release that did not measure it.
    """

    feature: Tensor
    text_id: Tensor
    score: Tensor
    position: Tensor
    start: Tensor
    end: Tensor
    span: list[str]
    d_sae: int
    n_texts: int
    n_tokens: int
    complete: bool = True
    feature_max: Tensor | None = field(default=None, repr=False)

    def by_feature(self) -> dict[int, list[TextSpan]]:
        """The spans of each latent that has some, best first."""
        return _grouped(self.feature.tolist(), self.text_id.tolist(), self.score.tolist(), self.span)


def _grouped(
    features: list[int], texts: list[int], scores: list[float], spans: list[str]
) -> dict[int, list[TextSpan]]:
    found: dict[int, list[TextSpan]] = {}
    for feature, text, score, span in zip(features, texts, scores, spans, strict=True):
        found.setdefault(feature, []).append(TextSpan(text, score, span))
    return found


def write_parquet(spans: Spans, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    columns: dict[str, Any] = {name: getattr(spans, name).numpy() for name in COLUMNS}
    table = pyarrow.table({**columns, "span": pyarrow.array(spans.span, pyarrow.string())})
    parquet.write_table(table, path)


def write_lines(spans: Spans, path: Path) -> None:
    """spans.tsv."""
    rows = zip(spans.feature.tolist(), spans.text_id.tolist(), spans.score.tolist(), spans.span, strict=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("NeuronID\tTextID\tScore\tSpan\n")
        file.writelines(
            f"{feature}\t{text}\t{score:.8f}\t{escape(span, returns=True)}\n" for feature, text, score, span in rows
        )


def write_features(spans: Spans, path: Path) -> None:
    """features.tsv."""
    grouped = spans.by_feature()
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("FeatureID\tWords\n")
        for feature in range(spans.d_sae):
            found = grouped.get(feature, [])
            words = "\\n".join(
                f"Span {rank}: {escape(entry.span, returns=True)}" for rank, entry in enumerate(found, 1)
            )
            file.write(f"{feature}\t{words}\n")


WRITERS = {"spans.parquet": write_parquet, "spans.tsv": write_lines, "features.tsv": write_features}


def read_table(url: str | Path) -> dict[str, Any]:
    """The columns of a spans.parquet: tensors, and the list `span`."""
    import pyarrow.parquet as parquet

    fs, place = url_to_fs(str(url))
    table = parquet.read_table(io.BytesIO(fs.cat_file(place)))
    columns = {
        name: torch.tensor(table[name].to_numpy(), dtype=dtype) for name, dtype in zip(COLUMNS, DTYPES, strict=True)
    }
    return {**columns, "span": table["span"].to_pylist()}


def read_spans(path: str | Path) -> dict[int, list[TextSpan]]:
    """The spans of each latent that has some, best first.

    Args:
        path: a folder that `SpanCollector` wrote, its spans.parquet or its spans.tsv; or an fsspec URL of one.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is no table of spans.
    """
    fs, place = url_to_fs(str(path))
    if fs.isdir(place):
        place = f"{place.rstrip('/')}/spans.parquet"
    if not fs.exists(place):
        raise FileNotFoundError(f"There are no spans at {str(path)!r}: `sae-transformers spans` writes them.")
    if place.endswith(".parquet"):
        table = read_table(fs.unstrip_protocol(place))
        return _grouped(table["feature"].tolist(), table["text_id"].tolist(), table["score"].tolist(), table["span"])
    lines = fs.cat_file(place).decode("utf-8").split("\n")
    if lines[0].split("\t") != ["NeuronID", "TextID", "Score", "Span"]:
        raise ValueError(
            f"A table of spans begins with NeuronID, TextID, Score, Span. Received: {lines[0][:80]!r} in "
            f"{str(path)!r}."
        )
    rows = [line.split("\t", 3) for line in lines[1:] if line]
    return _grouped(
        [int(row[0]) for row in rows],
        [int(row[1]) for row in rows],
        [float(row[2]) for row in rows],
        [unescape(row[3], returns=True) for row in rows],
    )
