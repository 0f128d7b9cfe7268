"""Any text classifier as a scorer: its own probabilities, whatever the batch; tokens counted, texts cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from sae_transformers.evaluation.scorers.text_classifier import ClassifierScorer
from tests.create_training_data.tiny_embedder import save_tiny_classifier
from tests.create_training_data.words import word_tokenizer

TEXTS = ["w1 w2 w3", "w4", "  ", "w5 w6 w7 w8 w9", " ".join(["w3"] * 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_classifier(tmp_path_factory.mktemp("classifier"))


def small(**settings: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=len(word_tokenizer()), **sizes, **settings)).eval()


def test_probabilities_are_the_classifiers_own(folder: str) -> None:
    scorer = ClassifierScorer(folder, "unclear", batch_size=2)
    found = scorer(TEXTS)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for text, score in zip(TEXTS, found.tolist(), strict=True):
        if not text.strip():
            assert score == 0
            continue
        ids = torch.tensor([word_tokenizer()(text)["input_ids"][:24]])
        with torch.no_grad():
            expected = float(model(ids).logits.double().softmax(-1)[0, 2])
        assert score == pytest.approx(expected, abs=1e-6)
    assert (scorer.tokens, scorer.cut) == (3 + 1 + 5 + 24, 1)
    assert torch.allclose(ClassifierScorer(folder, 2, batch_size=1)(TEXTS), found, atol=1e-6)
    assert scorer([]).shape == (0,)
    with pytest.raises(TypeError, match="one text"):
        scorer("w1")


@pytest.mark.parametrize(
    "settings", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}]
)
def test_sigmoid_where_labels_stand_alone(settings: dict[str, Any]) -> None:
    model = small(**settings)
    scorer = ClassifierScorer(model, 0, tokenizer=word_tokenizer(), max_tokens=3)
    with torch.no_grad():
        expected = (
            torch.cat([model(torch.tensor([ids])).logits for ids in ([5, 6, 7], [9, 10, 11])]).double().sigmoid()
        )
    assert torch.allclose(scorer(["w1 w2 w3", "w5 w6 w7 w8"]), expected[:, 0], atol=1e-6)
    assert scorer.cut == 1


def test_which_label(folder: str) -> None:
    assert ClassifierScorer(small(num_labels=2), tokenizer=word_tokenizer()).label == 1
    assert ClassifierScorer(small(num_labels=1), tokenizer=word_tokenizer()).label == 0
    assert ClassifierScorer(folder, "ACCEPTABLE").label == 1
    for label in (None, "nice", 3):
        with pytest.raises(ValueError, match=f"'unacceptable', 'acceptable', 'unclear'. Received: label={label!r}"):
            ClassifierScorer(folder, label)


def test_what_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="tokenizer=None"):
        ClassifierScorer(small(num_labels=2))
    with pytest.raises(ValueError, match="batch_size=0"):
        ClassifierScorer(folder, 1, batch_size=0)
    with pytest.raises(OSError, match="no-such"):
        ClassifierScorer(str(Path(folder) / "no-such"), 1)
