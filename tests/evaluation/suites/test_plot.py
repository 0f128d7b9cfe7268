from pathlib import Path

import pytest

from sae_transformers.evaluation.results import Measurement, SuiteResult
from sae_transformers.evaluation.suites.plot import plot_suite


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    some = [
        Measurement("auroc", 0.8, "latent 3", 0.7, 0.9), Measurement("auroc", 0.9, "DiffMean"),
        Measurement("f1", None, "latent 3"), Measurement("l0", 32.0, data="texts"),
    ]  # fmt: skip
    found = plot_suite(SuiteResult("detection", {}, some), tmp_path / "a" / "b.svg")
    assert found is not None and found == tmp_path / "a" / "b.svg"
    assert [path.name for path in found.parent.iterdir()] == ["b.svg"]
    text = found.read_text(encoding="utf-8")
    assert "<!-- auroc -->" in text and "<!-- DiffMean -->" in text
    assert "<!-- l0, texts -->" not in text  # of one method: nothing to compare
    alone = plot_suite(SuiteResult("x", {}, some[2:]), tmp_path / "x.svg")
    assert alone is not None and "<!-- l0, texts -->" in (text := alone.read_text(encoding="utf-8"))
    assert "<!-- f1 -->" not in text  # it has no value


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'x'"):
        plot_suite(SuiteResult("x", {}, [Measurement("f1", None)]), tmp_path / "x.png")
