"""Bias reduction from Python: texts in memory, the parts that are measured, what a run that is cut off leaves."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_transformers import BiasSettings, SaeForCausalLM, reduce_bias
from sae_transformers.evaluation.fairness.data import BiasData, LastWordPart, PairPart
from sae_transformers.evaluation.fairness.stereotypes import SentencePair
from sae_transformers.evaluation.settings import BootstrapSettings
from sae_transformers.latents.settings import ReadingSettings
from tests.cli.test_reduce_bias import WORDS, tokenizer
from tests.figures import drawn
from tests.tiny import tiny_base, tiny_sae

PAIRS = [SentencePair(f"the {w} met her .", f"the {w} met him .", kind="gender") for w in WORDS[10:13]]
MARKED = [pair._replace(marked=((((len(pair.more) - 5), (len(pair.more) - 2)),),) * 2) for pair in PAIRS]
DATA = BiasData((MARKED, MARKED), (MARKED, MARKED), [*PAIRS, PAIRS[0]._replace(kind="age")], ["he saw her"] * 5)
SETTINGS = BiasSettings(
    counts=(0, 1, 3, 1000), random_counts=(2,), max_loss=99, bootstrap=BootstrapSettings(resamples=10)
)


@pytest.fixture(scope="module")
def model() -> Any:
    saes = [tiny_sae(layer=0, seed=2), tiny_sae(layer=1)]
    return SaeForCausalLM.from_base(tiny_base(vocab_size=len(WORDS)), saes=saes).eval()


def texts(count: int = 30) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS[4:21], k=10)) for _ in range(count)]


def test_texts_in_memory_become_steering(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[int, int]] = []
    settings = replace(SETTINGS, reading=ReadingSettings(max_length=8))
    found = reduce_bias(
        model, tokenizer(), texts(), DATA, settings, sae=1, out=tmp_path, progress=lambda *of: reported.append(of)
    )
    assert [run.name for run in found.runs] == ["0 swaps", "1 swaps", "3 swaps", "2 random, draw 1"]
    assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]
    partial = json.loads((tmp_path / "results.json").read_text())
    assert partial["facts"] == {"complete": False} and list(partial["runs"]) == [run.name for run in found.runs]
    assert all(edit.sae == 1 for edit in found.steering.feature_edits)
    assert [edit.feature for edit in found.steering.feature_edits] == found.features[: found.chosen]
    assert len(found.random_features) == 1 and len(found.random_features[0]) == 3
    assert found.cut == found.texts > 10 and found.tokens <= 7 * found.texts
    assert found.summary()[1] == f"{found.cut} rows were cut at 8 tokens (max_length)"
    assert list(found.table()[0]) == [
        "features", "WinoBias 1 test", "WinoBias 2 test", "CrowS gender", "CrowS other", "LAMBADA: right, perplexity"
    ]  # fmt: skip
    frame = found.to_frame()
    assert set(frame["part"]) == {part.name for part in found.parts} and "sentence.gap" in set(frame["measure"])
    assert "features qualify" in found._repr_html_()
    figures = drawn(monkeypatch)
    found.plot("a.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels) == ["WinoBias 1 test", "WinoBias 2 test", "CrowS gender", "CrowS other"]
    own, random_draw = (bars.lines[0] for bars in panels["CrowS gender"].containers)
    gaps = [run.measures["CrowS gender"]["sentence"]["gap"]["value"] for run in found.runs]
    assert list(own.get_xdata()) == [0, 1, 3] and list(own.get_ydata()) == gaps[:3]
    assert list(random_draw.get_xdata()) == [2] and list(random_draw.get_ydata()) == gaps[3:]
    assert [path.name for path in found.save(tmp_path, {"model": "m"})] == ["results.json", "steering.json"]
    facts = json.loads((tmp_path / "results.json").read_text())["facts"]
    assert facts["complete"] and facts["model"] == "m" and facts["features"] == found.features


def test_a_number_with_too_great_a_loss_is_not_chosen(model: Any) -> None:
    found = reduce_bias(model, tokenizer(), texts(), DATA, replace(SETTINGS, max_loss=-99, random_seeds=0))
    assert found.chosen == 0 and not found.steering.edits and found.random_features == []


def test_parts_choose_or_report() -> None:
    parts = {part.name: part for part in DATA.parts(max_pairs=2, max_choose=1, max_lambada=4)}
    assert {name: len(part) for name, part in parts.items()} == {
        "WinoBias 1 choose": 1, "WinoBias 2 choose": 1, "WinoBias 1 test": 2, "WinoBias 2 test": 2,
        "CrowS gender": 2, "CrowS other": 1, "LAMBADA choose": 1, "LAMBADA": 3,
    }  # fmt: skip
    assert [name for name, part in parts.items() if part.chooses] == [name for name in parts if "choose" in name]
    assert isinstance(parts["LAMBADA"], LastWordPart) and isinstance(parts["CrowS other"], PairPart)
    assert parts["CrowS other"].by == ("sentence", "shared")
    assert [part.name for part in BiasData((MARKED, MARKED), (MARKED, MARKED)).parts()] == list(parts)[:4]


def test_bad_input(model: Any) -> None:
    with pytest.raises(ValueError, match="Received: SAE 2"):
        reduce_bias(model, tokenizer(), texts(), DATA, SETTINGS, sae=2)
    with pytest.raises(ValueError, match="rows with gendered words"):
        reduce_bias(model, tokenizer(), ["the clerk left"], DATA, SETTINGS)
    with pytest.raises(ValueError, match="random_counts=\\(-1,\\)"):
        BiasSettings(random_counts=(-1,))
    with pytest.raises(OSError, match="nowhere"):
        reduce_bias(model, tokenizer(), texts(), "nowhere", SETTINGS)
