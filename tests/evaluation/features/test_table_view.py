"""The table as it is read: the original's columns, both ends, within the width of a terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sae_transformers.evaluation.features.table import FeatureTable, LogitWeights
from sae_transformers.evaluation.features.table_view import COLUMNS, head_and_tail, original_columns

F64 = torch.float64


def made(n: int) -> FeatureTable:
    """Feature i has mean i * 1e-9, std 1 + i, skewness -i, kurtosis 3 + i."""
    i = torch.arange(n, dtype=F64)
    ids, weights = torch.zeros(n, 2, dtype=torch.long), torch.zeros(n, 2)
    words = [[" MRI", "\n"], ["日本語" * 20, " b"], *([f" w{k}", "x"] for k in range(2, n))][:n]
    return FeatureTable(LogitWeights(i * 1e-9, 1 + i, -i, 3 + i, ids, weights, ids, weights), words, words)


def test_a_short_table_is_shown_whole() -> None:
    table = replace(made(3), log10_frequency=torch.tensor([-3.76049, -10, -1], dtype=F64), facts={"text_tokens": 1234})
    assert head_and_tail(table).splitlines() == [
        "feature    mean    std skewness kurtosis sparsity  top_activated_words",
        "      0  0.0000 1.0000  -0.0000   3.0000  -3.7605  MRI \\n",
        "      1 1.0e-09 2.0000  -1.0000   4.0000 -10.0000  日本語日本語日本語日本語日本…",
        "      2 2.0e-09 3.0000  -2.0000   5.0000  -1.0000  w2 x",
        "[3 features; sparsity: log10 of the firing frequency, counted on 1,234 tokens of",
        "the text]",
    ]


def test_head_and_tail_of_a_long_one() -> None:
    lines = head_and_tail(made(24), rows=2).splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["feature", "0", "1", "...", "22", "23"]
    assert lines[5].split() == ["23", "2.3e-08", "24.0000", "-23.0000", "26.0000", "-", "w23", "x"]
    assert "none was published" in " ".join(lines[6:])


@pytest.mark.parametrize("width", [72, 80, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    from rich.cells import cell_len

    lines = head_and_tail(made(30), width=width).splitlines()
    assert max(map(cell_len, lines)) <= width


def test_what_was_published_comes_before_what_was_counted() -> None:
    counted, published = torch.tensor([-1.0, -2.0], dtype=F64), torch.tensor([-3.0, -10.0], dtype=F64)
    table = replace(
        made(2), log10_frequency=counted, published_sparsity=published, facts={"published_sparsity": "my/sae/s"}
    )
    assert original_columns(table)["sparsity"] == [-3.0, -10.0] and list(original_columns(table)) == list(COLUMNS)
    assert "as published, my/sae/s]" in head_and_tail(table, width=200)
