"""What targets and positions stand for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import SaeModel
from sae_transformers.evaluation.attribution.targets import read_target
from tests.create_training_data.words import word_tokenizer
from tests.evaluation.attribution import worlds
from tests.tiny import tiny_base, tiny_model, tiny_sae

TOKENIZER = word_tokenizer()
IDS = [11, 14, 20, 14]  # w7 w10 w16 w10


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def classifier():
    return worlds.classifier()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize(
    ("target", "position", "name", "read", "expected"),
    [
        ("w30", None, "'w30'", 4, lambda last: last[34]),
        (34, -1, "'w30'", 4, lambda last: last[34]),
        (("w30", 5), None, "'w30' - 'w1'", 4, lambda last: last[34] - last[5]),
        ("w30", 1, "'w30'", 2, lambda last: last[34]),
        ("w30", -3, "'w30'", 2, lambda last: last[34]),
        (None, "w16", "'w16'", 2, lambda last: last[20]),  # why it is said there
        (("w30", "w31"), " w16", "'w30' - 'w31'", 2, lambda last: last[34] - last[35]),
    ],
)
def test_tokens(model, target, position, name, read, expected):
    found = read_target(model, TOKENIZER, IDS, target, position)
    assert (found.name, found.ids) == (name, IDS[:read])
    with torch.no_grad():
        value = found.of(model(torch.tensor([found.ids]), **found.options))
    torch.testing.assert_close(value[0], expected(logits(model, IDS)[0, read - 1]))


def test_by_default_the_most_likely_token(model):
    found = read_target(model, TOKENIZER, IDS, None, None)
    best = int(logits(model, IDS)[0, -1].argmax())
    assert found.name == repr(TOKENIZER.decode([best]))


def test_a_function_reads_the_whole_text(model):
    def entropy(output):
        return output.logits.softmax(-1).square().sum((1, 2))

    found = read_target(model, TOKENIZER, IDS, entropy, None)
    assert (found.name, found.ids, found.options) == ("entropy", IDS, {})


@pytest.mark.parametrize(
    ("target", "name", "columns"),
    [
        ("good", "good", (2,)),
        (0, "bad", (0,)),
        ("1", "fine", (1,)),
        (("good", "bad"), "good - bad", (2, 0)),
        (None, None, None),
    ],
)
def test_labels(classifier, target, name, columns):
    row = logits(classifier, IDS)[0]
    columns = columns or (int(row.argmax()),)
    found = read_target(classifier, TOKENIZER, IDS, target, None)
    assert found.name == (name or ["bad", "fine", "good"][columns[0]])
    expected = row[columns[0]] - (row[columns[1]] if len(columns) > 1 else 0)
    with torch.no_grad():
        torch.testing.assert_close(found.of(classifier(torch.tensor([found.ids])))[0], expected)


REFUSED = {
    "two tokens": ("w30 w31", None, r"which is 2: \['w30', 'w31'\]"),
    "no token": ("", None, "give its id. Received: ''"),
    "an id that is not there": (99, None, "from 0 to 98. Received: target=99"),
    "a word that is not known": ("Paris", None, "Received: 'Paris', which it does not know"),
    "the same twice": (("w30", "w30"), None, "two different ones"),
    "a token and its id": (("w30", 34), None, "both 34"),
    "three": (("w3", "w4", "w5"), None, "one token or two"),
    "a position beyond the end": ("w30", 4, "from -4 to 3: the text has 4 tokens. Received: position=4"),
    "a position before the start": ("w30", -5, "position=-5"),
    "a token that is not in the text": (None, "w50", "'w50' is not a token of the text"),
    "a token that is there twice": (None, "w10", r"stands at \[1, 3\]"),
    "the first token": (None, "w7", "nothing predicts"),
    "a function with a position": (lambda out: out, 1, "Received also: position=1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(model, case):
    target, position, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_target(model, TOKENIZER, IDS, target, position)


def test_a_token_that_has_a_space_is_suggested(model):
    """As byte-level tokenizers have them."""

    class Spaced:
        def __call__(self, text, **options):
            return {"input_ids": [5] if text == " Paris" else [6, 7]}

        def decode(self, ids):
            return {6: "Par", 7: "is"}[ids[0]]

    with pytest.raises(ValueError, match=r"' Paris' is one. Received: 'Paris', which is 2: \['Par', 'is'\]"):
        read_target(model, Spaced(), IDS, "Paris", None)


def test_kinds_that_are_no_targets(model, classifier):
    wrong: list[Any] = [3.5, True, {"a": 1}]
    for target in wrong:
        with pytest.raises(TypeError, match="must be a token, two of them, or a function"):
            read_target(model, TOKENIZER, IDS, target, None)
    with pytest.raises(ValueError, match=r"Labels are bad, fine, good \(0 to 2\). Received: target='great'"):
        read_target(classifier, TOKENIZER, IDS, "great", None)
    with pytest.raises(ValueError, match="two different labels"):
        read_target(classifier, TOKENIZER, IDS, ("bad", 0), None)
    with pytest.raises(ValueError, match="one output for a text. Received: position=1"):
        read_target(classifier, TOKENIZER, IDS, "good", 1)


def test_models_without_such_an_output():
    base = tiny_base()
    headless = SaeModel.from_base(base.model, saes=[tiny_sae(layer=1)])
    with pytest.raises(ValueError, match="SaeModel has no logits"):
        read_target(headless, TOKENIZER, IDS, "w30", None)
