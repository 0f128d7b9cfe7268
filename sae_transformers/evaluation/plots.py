"""Plots of results, where matplotlib is installed (`pip install sae-transformers[plots]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..latents.output_files import whole_file
from .classification import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure | None:
    """Of these inches, drawn without a display; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a picture in the format of its ending, whole or not at all. Returns its path."""
    with whole_file(path) as draft:
        figure.savefig(draft, format=Path(path).suffix[1:], dpi=dpi)
    return Path(path)


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
    figure = new_figure(7, 5)
    if figure is None:
        return None
    names = {"delta_in_std": "|Δ logit| under swap, in standard deviations", "ece": "calibration error", "f1": "F1"}
    x = x if all(x in row for found in rows.values() for row in found) else "ece"
    axes = figure.add_subplot()
    for method, found in rows.items():
        across, up = (summary(found)[name] for name in (x, y))
        halves = [None, None] if len(found) < 2 else [across.high - across.mean, up.high - up.mean]
        axes.errorbar(across.mean, up.mean, xerr=halves[0], yerr=halves[1], fmt="o", capsize=2)
        axes.annotate(method, (across.mean, up.mean), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel=names.get(x, x), ylabel=names.get(y, y))
    axes.grid(alpha=0.3)
    return save_figure(figure, path)


def plot_bars(values: Mapping[str, float], path: str | Path, label: str) -> Path | None:
    """A bar for each name, the first on top.

    Args:
        values: name -> how long its bar is.
        path: of the picture, in the format of its ending.
        label: what the bars count.

    Returns:
        The path; None without matplotlib.
    """
    figure = new_figure(7, 1 + 0.3 * len(values))
    if figure is None:
        return None
    axes = figure.add_subplot()
    axes.barh(range(len(values)), list(values.values()))
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set(xlabel=label)
    return save_figure(figure, path)


def plot_histograms(groups: Mapping[str, Sequence[float]], path: str | Path, label: str) -> Path | None:
    """How the values of each group are distributed, as shares in the same twenty bins.

    Args:
        groups: name -> its values; groups without any are left out.
        path: of the picture, in the format of its ending.
        label: what the values are.

    Returns:
        The path; None without matplotlib.

    Raises:
        ValueError: there is no value.
    """
    groups = {name: values for name, values in groups.items() if values}
    if not groups:
        raise ValueError("There is nothing to draw. Received: no value.")
    figure = new_figure(7, 4)
    if figure is None:
        return None
    axes = figure.add_subplot()
    least = min(min(values) for values in groups.values())
    most = max(max(values) for values in groups.values())
    for name, values in groups.items():
        n = len(values)
        axes.hist(values, bins=20, range=(least, most), weights=[1 / n] * n, alpha=0.5, label=f"{name} (n = {n})")
    axes.set(xlabel=label, ylabel="share")
    axes.legend()
    return save_figure(figure, path)


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    path: str | Path,
    x: str,
    y: str,
) -> Path | None:
    """Curves with their intervals, a panel for each thing that is measured.

    Args:
        panels: title -> curve's name -> (x, value, low, high) of each point, low and high of its interval.
        path: of the picture, in the format of its ending.
        x, y: what the axes show.

    Returns:
        The path; None without matplotlib.
    """
    figure = new_figure(4 * len(panels), 4)
    if figure is None:
        return None
    for place, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, points in curves.items():
            across, values, low, high = zip(*points, strict=True)
            down = [value - end for value, end in zip(values, low, strict=True)]
            up = [end - value for value, end in zip(values, high, strict=True)]
            axes.errorbar(across, values, yerr=[down, up], fmt="o-", capsize=2, label=name)
        axes.set(title=title, xlabel=x, ylabel=y if place == 1 else "")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    return save_figure(figure, path)


def plot_lines(lines: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, x: str, y: str) -> Path | None:
    """Lines over numbers of things, which double: 0, 1, 2, 4, ...

    Args:
        lines: name -> its points.
        path: of the picture, in the format of its ending.
        x, y: what the axes show.

    Returns:
        The path; None without matplotlib.
    """
    figure = new_figure(6, 4)
    if figure is None:
        return None
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, path)
