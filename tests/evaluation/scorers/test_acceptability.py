"""Acceptability: log-odds against a plain computation, and any classifier."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sae_transformers.evaluation.scorers.acceptability import AcceptabilityClassifier, SlorScorer, unigram_log_probs
from tests.create_training_data.tiny_embedder import save_tiny_classifier
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base


def test_frequencies_are_smoothed_by_one() -> None:
    found = unigram_log_probs([torch.tensor([4, 4, 5]), torch.tensor([7])], 10)
    assert float(found.exp().sum()) == pytest.approx(1)
    assert found[[4, 5, 7, 0]].exp().tolist() == pytest.approx([3 / 14, 2 / 14, 2 / 14, 1 / 14])


@pytest.mark.parametrize("begins", [False, True])
def test_log_odds_equal_one_text_at_a_time(begins: bool) -> None:
    base, tokenizer = tiny_base(vocab_size=94), word_tokenizer(begins)
    unigrams = unigram_log_probs([torch.arange(94)[::3]], 94)
    texts = ["w1 w2 w3 w4 w5", "w7", "w9 w8", "", "w3 " * 40]
    found = SlorScorer(base, tokenizer, unigrams, rows_at_once=2, max_tokens=20).score(texts)
    for text, value in zip(texts, found.tolist(), strict=True):
        ids = torch.tensor(tokenizer(text, truncation=True, max_length=20)["input_ids"], dtype=torch.long)
        if len(ids) < 2:
            assert math.isnan(value)
            continue
        with torch.no_grad():
            logs = base(ids[None]).logits[0].log_softmax(-1).double()
        terms = [float(logs[i - 1, ids[i]] - unigrams[ids[i]]) for i in range(1, len(ids))]
        assert value == pytest.approx(sum(terms) / len(terms), abs=1e-4)
    assert SlorScorer(base, tokenizer, unigrams).score([]).shape == (0,)


def test_a_rare_word_the_model_expects_is_worth_more_than_a_frequent_one() -> None:
    """What plain likelihood cannot tell: the frequency is taken out."""
    base, tokenizer = tiny_base(vocab_size=94), word_tokenizer()
    with torch.no_grad():
        base.lm_head.weight.zero_()  # every token is as likely as any other
    counts = torch.tensor([4] * 50 + [5])  # w0 is frequent
    rare, frequent = SlorScorer(base, tokenizer, unigram_log_probs([counts], 94)).score(["w1 w1", "w0 w0"]).tolist()
    assert rare - frequent == pytest.approx(math.log(51 / 2))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_classifier(tmp_path_factory.mktemp("cola"))


def test_any_classifier(classifier: str) -> None:
    texts = ["w1 w2 w3", "", "w4 " * 60, "w5"]
    scorer = AcceptabilityClassifier(classifier, device="cpu", rows_at_once=2)
    found = scorer.score(texts)
    assert math.isnan(found[1]) and scorer.label == 1
    ids = word_tokenizer()("w1 w2 w3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = scorer.model(input_ids=ids).logits.softmax(-1)[0, 1]
    assert float(found[0]) == pytest.approx(float(expected), abs=1e-6)
    assert 0 < float(found[2]) < 1  # cut at what the model has positions for
    all_three = sum(
        AcceptabilityClassifier(classifier, label=label, device="cpu").score(["w5"])
        for label in ("unacceptable", 1, "2")
    )
    assert float(all_three) == pytest.approx(1, abs=1e-6)


def test_bad_input(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Labels: unacceptable, acceptable, unclear. Received: label='good'"):
        AcceptabilityClassifier(classifier, label="good")
    with pytest.raises(OSError, match="could not be read as a text classifier"):
        AcceptabilityClassifier(str(tmp_path))
    with pytest.raises(ValueError, match=r"tokens in \[0, 5\). Received: 2 tokens, the largest 7"):
        unigram_log_probs([torch.tensor([1, 7])], 5)
    with pytest.raises(ValueError, match="Received: 0 tokens"):
        unigram_log_probs([], 5)
    with pytest.raises(ValueError, match="max_tokens=1"):
        SlorScorer(None, None, torch.zeros(3), max_tokens=1)
    assert len(WORDS) == 90  # the vocabulary of 94 above
