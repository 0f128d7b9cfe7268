"""Cards of metrics, read from their source."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

from sae_transformers.hub_cards.facts import AuthorFacts
from sae_transformers.hub_cards.metric_card import is_metric, metric_card, read_metric
from tests.hub_cards.test_model_card import compare

SOURCE = '''"""Share of | word trigrams --- that repeat <earlier> ones."""

import datasets
import evaluate

_KWARGS_DESCRIPTION = """
Args:
    predictions: texts.
```
"""


class Repetition(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="@misc{x}", inputs_description=_KWARGS_DESCRIPTION, features=None
        )


raise SystemExit("a card must not run this")
'''


def folder(path: Path) -> Path:
    path.mkdir()
    (path / f"{path.name}.py").write_text(SOURCE)
    (path / "requirements.txt").write_text("# of the metric\nevaluate>=0.4\n")
    return path


def test_a_card_of_a_metric(tmp_path: Path) -> None:
    metric = folder(tmp_path / "repetition")
    card = metric_card(read_metric(metric), AuthorFacts(licence="apache-2.0", limits="Words are split at spaces."))
    compare(card, "metric.md")
    data = SpaceCard(card).data.to_dict()
    assert data["tags"] == ["evaluate", "metric"] and data["sdk"] == "gradio"
    assert data["description"] == "Share of | word trigrams --- that repeat <earlier> ones."
    assert is_metric(metric) and not is_metric(tmp_path)


def test_a_metric_that_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "m.py").write_text("from evaluate import Metric\n\n\nclass M(Metric):\n    pass\n")
    card = metric_card(read_metric(tmp_path / "m"))
    assert all(line in card for line in ("What it measures is not said", "What it takes is not said", "No licence"))


def test_no_metric_and_too_many_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluate.Metric"):
        read_metric(tmp_path)
    metric = folder(tmp_path / "one")
    (metric / "one.py").rename(metric / "a.py")
    (metric / "b.py").write_text(SOURCE)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        read_metric(metric)


def test_a_metric_of_this_library_brings_its_facts(tmp_path: Path) -> None:
    from sae_transformers.evaluation.metrics.space import write_metric

    written = write_metric("repetition", tmp_path)
    facts = read_metric(written)
    assert facts.own_card == (written / "README.md").read_text()
    card = metric_card(facts)
    assert facts.limits in card and f"metric.compute({facts.call})  # {facts.answer}" in card
    (written / "repetition.py").write_text("from sae_transformers.evaluation.metrics import Nothing\n")
    with pytest.raises(ValueError, match="Received: 'Nothing'"):
        read_metric(written)
