"""Texts as people have them: a string, a list, a data set, a data frame, token ids, a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .texts import TextSource, open_text, read_column, rows_of_dataset, rows_of_list

TEXTS = (
    "a string, a list of strings, of rows or of token ids, a `datasets.Dataset`, a pandas DataFrame, a path, or what "
    "`open_text` gives"
)


class TokenizedTexts(NamedTuple):
    """texts: as given; decoded where token ids were given. ids: of each text, cut. cut: how many texts were cut."""

    texts: list[str]
    ids: list[list[int]]
    cut: int


def text_source(data: Any, *, text_column: str = "text", labels: Sequence[str] = ()) -> TextSource:
    """Rows of text from whatever holds them. A string is one text; a path or `open_text(name)` names a data set.

    Args:
        data: see `TEXTS`.
        text_column: of the text, where rows have columns.
        labels: columns of 0 and 1, likewise.

    Raises:
        TypeError: something else.
    """
    if isinstance(data, TextSource):
        return data
    if isinstance(data, str):
        return rows_of_list([data])
    if isinstance(data, os.PathLike):
        return open_text(os.fspath(data), column=text_column, labels=labels)
    made = partial(TextSource, column=text_column, labels=labels)
    if hasattr(data, "iterrows"):  # a DataFrame
        facts = {"text": "DataFrame", "rows": len(data)}
        return made(lambda start: _rows_of_frame(data, start), length=len(data), facts=facts)
    if hasattr(data, "column_names") and hasattr(data, "__len__"):  # datasets.Dataset
        facts = {"text": getattr(data, "_fingerprint", "Dataset"), "rows": len(data)}
        return made(rows_of_dataset(data), length=len(data), facts=facts)
    if hasattr(data, "column_names") and hasattr(data, "skip"):  # datasets.IterableDataset
        return made(rows_of_dataset(data), facts={"text": "IterableDataset"})
    if isinstance(data, Sequence) and all(isinstance(row, str) for row in data):
        return rows_of_list(data)
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        return made(lambda start: iter(data[start:]), length=len(data), facts={"text": "rows"})
    raise TypeError(f"Expected texts: {TEXTS}. Received: {type(data).__name__}.")


def _rows_of_frame(frame: Any, start: int) -> Iterator[Mapping[str, Any]]:
    return (frame.iloc[number].to_dict() for number in range(start, len(frame)))


def plain_texts(data: Any, *, text_column: str | None = None) -> list[str]:
    """The texts that have a word.

    Args:
        data: see `TEXTS`.
        text_column: where rows have columns; by default `text`, or the only one of a file.

    Raises:
        TypeError: something else.
        ValueError: there is no such text, or no such column.
    """
    if isinstance(data, os.PathLike):
        return read_column(os.fspath(data), text_column)
    source = text_source(data, text_column=text_column or "text")
    texts = [text for _, rows in source.blocks(1024, itertools.count()) for text in rows.texts if text.strip()]
    if not texts:
        raise ValueError("Expected texts with a word. Received: none.")
    return texts


def tokenized(
    tokenizer: PreTrainedTokenizerBase, data: Any, *, max_length: int = 256, text_column: str = "text"
) -> TokenizedTexts:
    """Token ids of texts, each cut at `max_length`; the ones that were cut are counted.

    Args:
        data: see `TEXTS`; token ids are lists of integers or an integer tensor (n, length).

    Raises:
        TypeError: something else.
        ValueError: `max_length` is not positive, or there is no text.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"`max_length` must be an integer of 1 or more. Received: max_length={max_length!r}.")
    if (ids := _given_ids(data)) is not None:
        texts = [str(tokenizer.decode(row)) for row in ids]
        return TokenizedTexts(texts, [row[:max_length] for row in ids], sum(len(row) > max_length for row in ids))
    source = text_source(data, text_column=text_column)
    texts = [text for _, rows in source.blocks(1024, itertools.count()) for text in rows.texts]
    if not texts:
        raise ValueError("Expected texts. Received: none.")
    options: dict[str, Any] = {"truncation": True, "return_attention_mask": False, "verbose": False}
    found = tokenizer(texts, max_length=max_length, **options)["input_ids"]
    rows = [list(row) for row in found]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    full = [texts[i] for i, row in enumerate(rows) if len(row) == max_length]
    longer = tokenizer(full, max_length=max_length + 1, **options)["input_ids"] if full else []
    return TokenizedTexts(texts, rows, sum(len(row) > max_length for row in longer))  # pyright: ignore


def _given_ids(data: Any) -> list[list[int]] | None:
    """Rows of token ids, where that is what was given."""
    if isinstance(data, Mapping) and "input_ids" in data:
        mask = data.get("attention_mask")
        rows = torch.as_tensor(data["input_ids"])
        kept = torch.ones_like(rows) if mask is None else torch.as_tensor(mask)
        rows, kept = torch.atleast_2d(rows), torch.atleast_2d(kept)
        return [row[there.bool()].tolist() for row, there in zip(rows, kept, strict=True)]
    if isinstance(data, Tensor) and not data.is_floating_point():
        return torch.atleast_2d(data).tolist()
    if isinstance(data, Sequence) and not isinstance(data, str) and len(data):
        if all(isinstance(row, int) for row in data):
            return [list(data)]
        if all(isinstance(row, (list, tuple)) and all(isinstance(i, int) for i in row) for row in data):
            return [list(row) for row in data]
        if all(isinstance(row, Tensor) and row.ndim == 1 and not row.is_floating_point() for row in data):
            return [row.tolist() for row in data]
    return None
