"""Plots of results, where matplotlib is installed (`pip install sae-transformers[plots]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .classification import summary


def plot_methods(
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | Path,
    *,
    x: str = "delta_in_std",
    y: str = "f1",
) -> Path | None:
    """A point a method with the 95 % intervals over its seeds: what it costs against what it is for.

    Args:
        rows: method -> one mapping of measures a seed.
        path: of the picture, in the format of its ending.
        x: the measure to the right; `ece` where the rows do not have it.
        y: the measure upwards.

    Returns:
        The path; None without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    names = {"delta_in_std": "|Δ logit| under swap, in standard deviations", "ece": "calibration error", "f1": "F1"}
    x = x if all(x in row for found in rows.values() for row in found) else "ece"
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, found in rows.items():
        across, up = (summary(found)[name] for name in (x, y))
        halves = [None, None] if len(found) < 2 else [across.high - across.mean, up.high - up.mean]
        axes.errorbar(across.mean, up.mean, xerr=halves[0], yerr=halves[1], fmt="o", capsize=2)
        axes.annotate(method, (across.mean, up.mean), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel=names.get(x, x), ylabel=names.get(y, y))
    axes.grid(alpha=0.3)
    path = Path(path)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format=path.suffix[1:], dpi=150)
    draft.replace(path)
    return path
