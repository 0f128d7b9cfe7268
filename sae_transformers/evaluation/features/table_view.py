"""A feature table as people read it: the columns of the original, a row a feature, the first ones and the last."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from typing import Any

from .table import FeatureTable

COLUMNS = ("feature", "mean", "std", "skewness", "kurtosis", "sparsity", "top_activated_words")


def original_columns(table: FeatureTable) -> dict[str, list[Any]]:
    """Column -> values, under the names of seansica/sae-vector-steering: feature, mean, std, skewness, kurtosis,
    sparsity (None where it is not known) and top_activated_words, the top tokens joined by spaces."""
    sparsity = [None] * len(table) if table.sparsity is None else table.sparsity.tolist()
    numbers = [getattr(table.weights, name).tolist() for name in COLUMNS[1:5]]
    words = [" ".join(map(shown_token, tokens)) for tokens in table.top_tokens]
    return dict(zip(COLUMNS, [list(range(len(table))), *numbers, sparsity, words], strict=True))


def shown_token(token: str) -> str:
    """A token without its outer white space, in one line; of white space alone, as Python writes it."""
    return repr(token)[1:-1].strip() or repr(token)


def head_and_tail(table: FeatureTable, rows: int = 5, width: int = 80) -> str:
    """The first rows and the last, and what sparsity is, in lines that are no wider than `width` columns.

    Args:
        rows: at each end; of a table with no more than twice as many all are shown.
        width: columns of a terminal; words that do not fit are cut, numbers never are.
    """
    columns = original_columns(table)
    n = len(table)
    places = list(range(n)) if n <= 2 * rows else [*range(rows), *range(n - rows, n)]
    cells = [[name, *(_number(columns[name][place]) for place in places)] for name in COLUMNS[:-1]]
    widths = [max(map(len, column)) for column in cells]
    lines = [" ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in zip(*cells, strict=True)]
    words = [COLUMNS[-1], *(columns[COLUMNS[-1]][place] for place in places)]
    left = max(len(COLUMNS[-1]), width - len(lines[0]) - 2)
    lines = [f"{line}  {_cut(text, left)}" for line, text in zip(lines, words, strict=True)]
    if len(places) < n:
        lines.insert(1 + rows, "...".rjust(widths[0]))
    return "\n".join([*lines, *textwrap.wrap(f"[{n:,} features; sparsity: {sparsity_source(table)}]", width)])


def sparsity_source(table: FeatureTable) -> str:
    """Where the column `sparsity` comes from, in words."""
    if table.published_sparsity is not None:
        return f"log10 of the firing frequency as published, {table.facts.get('published_sparsity', 'with the SAE')}"
    if table.log10_frequency is not None:
        counted = table.facts.get("text_tokens")
        tokens = f"{counted:,} tokens of " if counted else ""
        return f"log10 of the firing frequency, counted on {tokens}the text"
    return "not known, none was published with the SAE and no text was read"


def _number(value: float | int | None) -> str:
    if isinstance(value, int):
        return str(value)
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _cut(text: str, width: int) -> str:
    """As much of a text as fits, with a mark where it ends early; wide letters take two columns."""
    if _columns(text) <= width:
        return text
    kept, taken = "", 1  # the mark
    for letter in text:
        taken += _columns(letter)
        if taken > width:
            break
        kept += letter
    return kept.rstrip() + "…"


def _columns(text: str) -> int:
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )
