import sys

import pytest

from sae_transformers.evaluation.scorers.sentiment import vader_scorer


def test_vader_orders_plain_sentences() -> None:
    score = vader_scorer()
    assert score("A wonderful film, I loved it.") > 0.5 > score("It is a film.") > -0.5 > score("Awful, I hated it.")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'sae-transformers\[quickstart\]'"):
        vader_scorer()
