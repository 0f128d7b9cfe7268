"""A picture of a suite: each metric with its methods and their 95 % intervals."""

from __future__ import annotations

from pathlib import Path

from ..plots import new_figure, save_figure
from ..results import SuiteResult

LEAST_HEIGHT, ROW_HEIGHT = 1.2, 0.28  # inches


def plot_suite(suite: SuiteResult, path: str | Path) -> Path | None:
    """One panel a metric, one row a method: a point for the value, a line for its interval.

    A metric of a single method is left out, unless none has more: there is nothing to compare.

    Args:
        suite: with a value or more.
        path: of the picture, in the format of its ending; written whole or not at all.

    Returns:
        The path; None without matplotlib.

    Raises:
        ValueError: no measurement has a value.
    """
    panels: dict[str, list] = {}
    for one in suite.measurements:
        if one.value is not None:
            panels.setdefault(one.metric + (f", {one.data}" if one.data else ""), []).append(one)
    compared = {name: some for name, some in panels.items() if len(some) > 1}
    panels = compared or panels
    if not panels:
        raise ValueError(f"Expected measurements with a value. Received: none in the suite {suite.name!r}.")
    heights = [max(LEAST_HEIGHT, 0.8 + ROW_HEIGHT * len(some)) for some in panels.values()]
    figure = new_figure(8, sum(heights))
    if figure is None:
        return None
    every = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, some) in zip(every, panels.items(), strict=True):
        for row, one in enumerate(some):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [row, row], color="0.6", linewidth=2)
            axes.plot(one.value, row, "o", color="C0")
        axes.set(yticks=range(len(some)), yticklabels=[one.method or suite.name for one in some], ylim=(len(some), -1))
        axes.set_title(name, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return save_figure(figure, path, dpi=110)
