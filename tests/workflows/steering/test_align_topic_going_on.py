"""`align_topic`, stopped anywhere, goes on to the files of an undisturbed run and does no part twice."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_transformers import (
    TopicEmbeddingSettings,
    TopicGenerationSettings,
    TopicMeasuringSettings,
    TopicScoringSettings,
    TopicSettings,
    TopicTexts,
    align_topic,
)
from sae_transformers.workflows.steering.topic_result import TopicResult
from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.create_training_data.words import word_tokenizer
from tests.workflows.steering.test_align_topic import REFERENCE, TOPIC, model_of

# Sampled in batches, so that what is drawn depends on the batches before.
DRAWN = TopicGenerationSettings(max_new_tokens=3, temperature=1.0, top_k=50, batch_size=2)
SETTINGS = TopicSettings(
    scoring=TopicScoringSettings(compare=("swap:4",)),
    measuring=TopicMeasuringSettings(prompt_count=5, generation=DRAWN),
)
TUNED = replace(SETTINGS, measuring=replace(SETTINGS.measuring, lora_epochs=1.0))


class Stop(Exception):
    """In place of a kill: whatever was going on is lost."""


class Work:
    """What a run did: passes of the base, and texts that were embedded."""

    def __init__(self) -> None:
        self.passes = self.embedded = 0


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> TopicEmbeddingSettings:
    return TopicEmbeddingSettings(embedder=save_tiny_embedder(tmp_path_factory.mktemp("topic")))


def run(
    embedding: TopicEmbeddingSettings, settings: TopicSettings, stop_at: int | None = None
) -> tuple[TopicResult | None, Work]:
    """The result, None where it was stopped, and what was done; of models as a new process loads them."""
    model, embedder, work = model_of(), embedding.load(), Work()
    embed = embedder.embed

    def note(*_: Any) -> None:
        if work.passes == stop_at:
            raise Stop
        work.passes += 1

    def counted(texts: Any, **options: Any) -> Any:
        work.embedded += len(texts)
        return embed(texts, **options)

    model.lm.register_forward_pre_hook(note)
    embedder.embed = counted
    texts = TopicTexts([*REFERENCE, "w1"], [TOPIC[0], *TOPIC], topic_test=REFERENCE[3:5])
    try:
        return align_topic(model, word_tokenizer(), texts, settings, embedder=embedder), work
    except Stop:
        return None, work


def without_seconds(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: without_seconds(one) for name, one in told.items() if "seconds" not in name}
    return told


def saved(found: TopicResult | None, folder: Path) -> dict[str, Any]:
    """All that was saved, but for the seconds."""
    assert found is not None
    names = sorted(file.name for file in found.save(folder))
    assert names == sorted(file.name for file in folder.iterdir())
    files = {name: (folder / name).read_bytes() for name in names}
    report = without_seconds(json.loads(files["report.json"]))
    return {**files, "report.json": json.dumps(report)}


@pytest.fixture(scope="module")
def undisturbed(
    embedding: TopicEmbeddingSettings, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], tuple[dict[str, Any], Work]]:
    """What a run that is not stopped saves, and its work; each is made where a test asks for it."""

    @functools.cache
    def make(tuned: bool) -> tuple[dict[str, Any], Work]:
        settings, folder = TUNED if tuned else SETTINGS, tmp_path_factory.mktemp("undisturbed")
        found, most = run(embedding, settings)
        _, work = run(embedding, replace(settings, journal=folder / "whole" / "topic.partial.jsonl"))
        assert work.passes <= most.passes  # two methods that write the same are judged once
        return saved(found, folder / "saved"), work

    return make


SLOW = [pytest.param(i / 24, False, marks=pytest.mark.slow) for i in range(25)]


@pytest.mark.parametrize(
    ("share", "tuned"),
    [(0.4, False), (0.8, False), *SLOW,
     *(pytest.param(share, True, marks=pytest.mark.slow) for share in (0.8, 0.85, 0.9, 0.95, 1.0))],
)  # fmt: skip
def test_a_stopped_run_goes_on(
    embedding: TopicEmbeddingSettings, undisturbed: Any, share: float, tuned: bool, tmp_path: Path
) -> None:
    expected, whole = undisturbed(tuned)
    settings = replace(TUNED if tuned else SETTINGS, journal=tmp_path / "topic.partial.jsonl")
    nothing, first = run(embedding, settings, stop_at=round(share * (whole.passes - 1)))
    assert nothing is None
    found, second = run(embedding, settings)
    again, third = run(embedding, settings)
    assert (third.passes, third.embedded) == (0, 0)
    # Lost is at most the part under way: reading a set, continuing a batch, judging a method, tuning.
    lost = first.passes + second.passes - whole.passes
    assert 0 <= lost <= (20 if tuned else 6) and first.embedded + second.embedded - whole.embedded <= 5
    assert found is not None and (found.summary()[0].startswith("Went on after ") or share < 0.1)
    assert saved(again, tmp_path) == expected


def test_other_texts_begin_anew(embedding: TopicEmbeddingSettings, undisturbed: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, journal=tmp_path / "topic.partial.jsonl")
    whole = undisturbed(False)[1].passes
    run(embedding, settings, stop_at=whole - 1)
    prompted = replace(settings, measuring=replace(settings.measuring, topic_prompt="w3 w4"))
    found, work = run(embedding, prompted)
    assert found is not None and work.passes >= whole - 6 and "Went on" not in found.summary()[0]
