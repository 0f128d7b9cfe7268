"""Topic alignment from Python: texts in memory, what a result tells and holds."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import (
    TopicEmbeddingSettings,
    TopicGenerationSettings,
    TopicMeasuringSettings,
    TopicScoringSettings,
    TopicSettings,
    TopicTexts,
    align_topic,
)
from sae_transformers.create_training_data.sentence_embeddings import SentenceEmbedder
from sae_transformers.evaluation.topics.settings import TopicMethod
from sae_transformers.latents.settings import ReadingSettings
from sae_transformers.training.steering.topic_scores import TopicScores
from tests.create_training_data.tiny_embedder import save_tiny_embedder
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_model, tiny_sae

SETTINGS = TopicSettings(
    scoring=TopicScoringSettings(compare=("swap:4",)),
    measuring=TopicMeasuringSettings(prompt_count=2, generation=TopicGenerationSettings(max_new_tokens=3)),
)


def some(count: int, words: list[str], seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


REFERENCE, TOPIC = some(22, WORDS), some(4, WORDS[:12], 1)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEmbedder:
    return TopicEmbeddingSettings(embedder=save_tiny_embedder(tmp_path_factory.mktemp("topic"))).load()


def model_of(count: int = 1) -> Any:
    saes = [tiny_sae(layer=layer, seed=layer) for layer in range(count)]
    return tiny_model(base=tiny_base(vocab_size=len(word_tokenizer())), saes=saes)


def test_texts_in_memory_become_steering(embedder: SentenceEmbedder, tmp_path: Path) -> None:
    model, reported = model_of(), []
    texts = TopicTexts([*REFERENCE, "w1", " ".join(WORDS[:40])], TOPIC)
    settings = replace(SETTINGS, reading=ReadingSettings(max_length=16))
    found = align_topic(
        model, word_tokenizer(), texts, settings, embedder=embedder, progress=lambda *of: reported.append(of)
    )
    assert found.left_out == {"reference": 1, "topic": 0} and found.cut == {"reference": 1, "topic": 0}
    lines = found.summary()
    assert lines[0] == "1 reference text(s) of a single token are left out"
    assert lines[1] == "1 reference text(s) were cut at 16 tokens (max_length)"
    assert lines[-1].startswith("Warning:") == found.warning
    assert list(found.methods) == ["orig", "swap", "swap:4", "prompting"]
    assert [row["method"] for row in found.table()] == list(found.methods)
    frame = found.to_frame()
    assert len(frame) == 64 and list(frame) == ["feature", "score", "cost", "reference_texts", "topic_share", "kind"]
    assert "not above" in found._repr_html_() or "Warning" in found._repr_html_()
    done, total = zip(*reported, strict=True)
    assert list(done) == sorted(done) and set(total) == {24 + 4 + 4 * 2} == {done[-1]}
    assert [path.name for path in found.save(tmp_path)] == [
        "scores.csv", "scores.parquet", "steering.json", "report.json", "samples.json"
    ]  # fmt: skip
    assert found.plot(tmp_path / "methods.png") is None or (tmp_path / "methods.png").stat().st_size > 1000
    ids = torch.arange(4, 12).view(1, -1)
    with torch.no_grad():
        steered, plain = (model(ids, steering=given).logits for given in (found.steering, False))
    assert not torch.allclose(steered, plain)


def test_another_sae_and_first_tokens_that_do_not_count(embedder: SentenceEmbedder) -> None:
    settings = replace(
        SETTINGS, measuring=TopicMeasuringSettings(prompt_count=0), reading=ReadingSettings(skip_first=3)
    )
    texts = TopicTexts([*REFERENCE, "w1 w2 w3"], TOPIC)
    found = align_topic(model_of(2), word_tokenizer(), texts, settings, sae=1, embedder=embedder)
    assert found.steering.reweightings[0].sae == 1
    assert found.tokens["topic"] == 4 * 5 and found.left_out["reference"] == 1
    assert found.summary()[0] == "1 reference text(s) of 3 tokens or fewer are left out"
    assert found.methods == {} and found.samples == []
    with pytest.raises(ValueError, match="prompt_count=0"):
        found.plot("methods.png")


def test_bad_input(embedder: SentenceEmbedder) -> None:
    texts = TopicTexts(REFERENCE, TOPIC)
    short = TopicScores(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="Received: SAE 1"):
        align_topic(model_of(), word_tokenizer(), texts, SETTINGS, embedder=embedder, sae=1)
    with pytest.raises(ValueError, match="each of 64 latents.*Received: 3"):
        align_topic(model_of(), word_tokenizer(), texts, SETTINGS, embedder=embedder, scores=short)
    with pytest.raises(ValueError, match="texts with a word"):
        align_topic(model_of(), word_tokenizer(), TopicTexts(REFERENCE, [" "]), SETTINGS, embedder=embedder)


def test_methods_by_name() -> None:
    assert TopicMethod.parse("swap") == TopicMethod("swap", "swap", True, 1.0)
    assert TopicMethod.parse("swap:replace:2.5", strength=9) == TopicMethod("swap:replace:2.5", "swap", False, 2.5)
    assert TopicMethod.parse("weight:keep", keep_error=False).keep_error
    methods = TopicScoringSettings(method="swap:4", compare=("swap", "swap:4"), keep_error=False).methods()
    assert [(m.name, m.strength, m.keep_error) for m in methods] == [("swap:4", 4.0, False), ("swap", 1.0, False)]
    for name, expected in (("swap:often", "keep, replace and a strength"), ("sea", "Methods are orig, SAE")):
        with pytest.raises(ValueError, match=f"{expected}.*Received: '{name}'"):
            TopicScoringSettings(compare=(name,))
