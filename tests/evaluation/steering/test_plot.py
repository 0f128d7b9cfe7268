"""The Pareto plot: every setting has its marker, what is chosen a ring, and the file is written whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sae_transformers.evaluation.steering.plot import plot_steering


def row(method: str, setting: str, perplexity: float | None, score: float, **more: Any) -> dict[str, Any]:
    numbers = {"perplexity": perplexity, "concept_score": score}
    return {"method": method, "setting": setting, **numbers, "within_budget": True, "chosen_to": [], **more}


ROWS = [
    row("none", "none", 5.0, 0.1),
    row("latent 7", "-0.1", 6.0, 0.05),
    row("latent 7", "0.1", 6.5, 0.3, chosen_to=["raise"]),
    row("latent 7", "0.4", 90.0, 0.6, within_budget=False),
    row("prompt", "for", 5.5, 0.2, chosen_to=["raise"]),
    row("prompt", "left out", None, 0.2),
]


def test_one_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_steering(ROWS, tmp_path / "plots" / "a.png", title="toxicity")
    assert path is not None and path.stat().st_size > 1000
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import rcParams

    monkeypatch.setitem(rcParams, "svg.fonttype", "none")  # text as text
    path = plot_steering(ROWS, tmp_path / "a.svg", title="toxicity")
    drawn = path.read_text(encoding="utf-8") if path else ""
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    for wanted in (
        *("-0.1", "0.1 (raise)", "0.4", "for (raise)", "toxicity"),
        *("latent 7", "prompt", "no steering", "chosen", "beyond the budget"),
    ):
        assert wanted in texts
    assert "left out" not in texts and "perplexity under the unsteered model" in texts


def test_methods_differ_without_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[dict[str, Any]] = []
    plain = Axes.plot

    def plot(self: Any, *args: Any, **options: Any) -> Any:
        drawn.append({"at": args, **options})
        return plain(self, *args, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    plot_steering(ROWS, tmp_path / "a.png")
    points = {one["at"]: one for one in drawn if one.get("markersize") == 7}
    assert points[6.0, 0.05]["marker"] != points[5.5, 0.2]["marker"]
    assert points[90.0, 0.6]["markerfacecolor"] == "white" != points[6.0, 0.05]["markerfacecolor"]
    assert {one["at"] for one in drawn if one.get("markersize") == 15} == {(6.5, 0.3), (5.5, 0.2)}
    assert [one["at"] for one in drawn if one.get("marker") == "x"] == [(5.0, 0.1)]
    lines = [one["at"] for one in drawn if one.get("alpha") == 0.7]
    assert lines[0] == ([6.0, 5.0, 6.5, 90.0], [0.05, 0.1, 0.3, 0.6])  # unsteered between the two directions
    assert lines[1] == ([], [])


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'kl' and 'concept_score'. Received: 6 rows, none with both"):
        plot_steering(ROWS, tmp_path / "a.png", x="kl")
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nope"):
        plot_steering(ROWS, tmp_path / "a.nope")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_steering(ROWS, tmp_path / "a.png") is None
    assert not list(tmp_path.iterdir())
