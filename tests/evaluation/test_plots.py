"""Pictures of results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sae_transformers.evaluation.plots import plot_histograms, plot_methods

ROWS = {
    "plain": [{"f1": 0.7, "ece": 0.1, "delta_in_std": 0.3}, {"f1": 0.8, "ece": 0.2, "delta_in_std": 0.4}],
    "selfreg": [{"f1": 0.6, "ece": 0.1, "delta_in_std": 0.1}, {"f1": 0.7, "ece": 0.2, "delta_in_std": 0.2}],
}


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_point_a_method(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = plot_methods(ROWS, tmp_path / f"a.{ending}")
    assert path is not None and path.stat().st_size > 1000
    assert [file.name for file in tmp_path.iterdir()] == [f"a.{ending}"]
    one = {method: [{"f1": 0.5, "ece": 0.1}] for method in ROWS}
    assert plot_methods(one, tmp_path / f"b.{ending}") == tmp_path / f"b.{ending}"


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert plot_methods(ROWS, tmp_path / "a.png") is None
    assert not list(tmp_path.iterdir())


def test_a_histogram_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Received: no value"):
        plot_histograms({"label 1": [], "label 0": []}, tmp_path / "a.png", "score")
