"""`feature_table`, stopped at any of its parts, goes on to the table of an undisturbed run and does no part twice."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import FeatureTableSettings, ReadingSettings, SparseAutoencoder, feature_table
from sae_transformers.evaluation.features import table as table_of_weights
from sae_transformers.workflows.reading.feature_table import FeatureTableResult
from tests.covering import fast
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

TEXTS = word_texts(500)  # four blocks
SETTINGS = FeatureTableSettings(top_k=3, max_tokens=3000, reading=ReadingSettings(max_length=9))


class Stop(Exception):
    """In place of a kill: whatever was going on is lost."""


class Work:
    """What a run did: rows of logit weights that were made, and passes of the base."""

    def __init__(self) -> None:
        self.rows = self.passes = self.reports = 0


def run(
    settings: FeatureTableSettings, stop_after: int | None = None
) -> tuple[FeatureTableResult | None, SparseAutoencoder, Work]:
    """The result, None where it was stopped, of a base and an SAE as a new process loads them."""
    base, sae, work, make = tiny_base(), tiny_sae(layer=1, k=4), Work(), table_of_weights._block

    def progress(*_: int) -> None:
        work.reports += 1
        if stop_after is not None and work.reports > stop_after:
            raise Stop

    def block(rows: torch.Tensor, *rest: Any) -> Any:
        work.rows += len(rows)
        return make(rows, *rest)

    def note(*_: Any) -> None:
        work.passes += 1

    base.register_forward_pre_hook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_of_weights, "_block", block)
        patch.setattr(table_of_weights, "PART", 16)
        by_eight = partial(table_of_weights.logit_weights, elements_at_once=8 * 94)
        patch.setattr(table_of_weights, "logit_weights", by_eight)
        try:
            return feature_table(base, word_tokenizer(), settings, sae=sae, texts=TEXTS, progress=progress), sae, work
        except Stop:
            return None, sae, work


def saved(found: FeatureTableResult | None, folder: Path) -> dict[str, Any]:
    """All that was saved, but for the seconds."""
    assert found is not None
    found.save(folder)
    facts = json.loads((folder / "facts.json").read_text())
    assert facts.pop("seconds") > 0
    names = ("features.parquet", "features.csv", "features.json", "words.tsv")
    assert sorted(file.name for file in folder.iterdir()) == sorted(["facts.json", *names])
    return {**facts, **{name: (folder / name).read_bytes() for name in names if name != "features.parquet"}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], torch.Tensor, Work]:
    found, sae, work = run(SETTINGS)
    return saved(found, tmp_path_factory.mktemp("undisturbed")), sae.feature_max, work


# Eight blocks of rows, two a part, and four of texts.
@pytest.mark.parametrize("stop_after", fast(range(12), 0, 3, 8, 11))
def test_a_stopped_run_goes_on(undisturbed: Any, stop_after: int, tmp_path: Path) -> None:
    expected, maxima, whole = undisturbed
    assert whole.reports == 12 and whole.rows == 64
    settings = replace(SETTINGS, journal=tmp_path / "features.partial.jsonl")
    nothing, _, first = run(settings, stop_after)
    assert nothing is None
    found, sae, second = run(settings)
    done = 4 if stop_after >= 8 else stop_after // 2  # parts of rows
    assert second.rows == 64 - 16 * done and first.passes + second.passes == whole.passes
    assert found is not None and torch.equal(sae.feature_max, maxima)
    assert bool(found.summary()[0].startswith(f"Went on after {done + max(0, stop_after - 7)} parts")) == (
        stop_after > 1
    )
    again, _, third = run(settings)
    assert (third.rows, third.passes) == (0, 0)
    assert saved(again, tmp_path) == expected
