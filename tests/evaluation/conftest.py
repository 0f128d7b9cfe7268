"""A tiny model and a tokenizer of words that pads as generation wants it, one of each for a file of tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = word_tokenizer()
    made.padding_side = "left"
    return made
