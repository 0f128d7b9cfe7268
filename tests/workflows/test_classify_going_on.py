"""`classify`, stopped at any of its parts, goes on to the files of an undisturbed run and does no part twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import ClassifySettings, ComparisonSettings, classify, load_classifier_base, read_labelled
from sae_transformers.training.heads import comparison
from sae_transformers.workflows.classify_result import ClassifyResult
from sae_transformers.workflows.unintended import make_swaps
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae
from tests.workflows.test_classify import rows_of

PLAN = ComparisonSettings(
    methods=("plain", "selfreg", "leace"), seeds=(1, 2), folds=2, top=(3, 5), directions=(1,), keep="selfreg"
)
SETTINGS = ClassifySettings(comparison=PLAN, tokens_per_batch=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classify")
    tiny_base().save_pretrained(path / "base")
    word_tokenizer().save_pretrained(path / "base")
    return path


class Stop(Exception):
    """In place of a kill: whatever was going on is lost."""


class Work:
    """What a run did: passes of the base, and heads that were trained."""

    def __init__(self) -> None:
        self.passes = self.trained = 0


@contextmanager
def watched(base: Any) -> Iterator[Work]:
    work, train = Work(), comparison.train_heads

    def note(*_: Any) -> None:
        work.passes += 1

    def trained(*given: Any, **options: Any) -> Any:
        work.trained += 1
        return train(*given, **options)

    handle = base.register_forward_pre_hook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train_heads", trained)
        yield work
    handle.remove()


def run(folder: Path, settings: ClassifySettings, stop_after: int | None = None) -> tuple[ClassifyResult | None, Work]:
    """The result, None where it was stopped, with what was done; of a base as a new process loads it."""
    data = read_labelled(rows_of())
    torch.manual_seed(0)
    model, tokenizer, sae, _ = load_classifier_base(folder / "base", data, tiny_sae(layer=1))
    reports: list[int] = []

    def progress(done: int, _: int) -> None:
        reports.append(done)
        if stop_after is not None and len(reports) > stop_after:
            raise Stop

    found, swaps = None, make_swaps(data.texts["train"], "w0:w1")
    with watched(model.base_model) as work:
        try:
            found = classify(model, tokenizer, data, settings, sae=sae, swaps=swaps, progress=progress)
        except Stop:
            assert stop_after is not None
    work.reports = len(reports)  # pyright: ignore[reportAttributeAccessIssue]
    return found, work


def files(folder: Path) -> dict[str, bytes]:
    """All that was saved; a picture says when it was drawn."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png")
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[dict[str, bytes], Work]:
    found, work = run(folder, SETTINGS)
    assert found is not None
    found.save(folder / "undisturbed")
    return files(folder / "undisturbed"), work


# Of 26 reports the first 22 are batches that are read, the last four methods that were trained.
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, *(pytest.param(i / 26, marks=pytest.mark.slow) for i in range(27))])
def test_a_stopped_run_goes_on(
    folder: Path, undisturbed: tuple[dict[str, bytes], Work], share: float, tmp_path: Path
) -> None:
    expected, whole = undisturbed
    settings = replace(SETTINGS, journal=tmp_path / "classify.partial.jsonl")
    stop_after = round(share * (whole.reports - 1))  # pyright: ignore[reportAttributeAccessIssue]
    nothing, first = run(folder, settings, stop_after)
    assert nothing is None and settings.journal is not None and settings.journal.is_file()
    found, second = run(folder, settings)
    assert found is not None and found.summary()[0].startswith("Went on after ")
    assert first.passes + second.passes == whole.passes and first.trained + second.trained == whole.trained
    again, third = run(folder, settings)
    assert again is not None and (third.passes, third.trained) == (0, 0)
    again.save(tmp_path)
    assert files(tmp_path) == expected


def test_another_task_begins_anew(folder: Path, undisturbed: tuple[dict[str, bytes], Work], tmp_path: Path) -> None:
    settings = replace(SETTINGS, journal=tmp_path / "classify.partial.jsonl")
    run(folder, settings, 12)
    other = replace(settings, comparison=replace(PLAN, seeds=(1, 3)))
    found, work = run(folder, other)
    assert found is not None and work.passes == undisturbed[1].passes and "Went on" not in found.summary()[0]
