"""The Pareto plot of the steering suite: what each strength gains of a concept against what it costs in likelihood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..plots import new_figure, save_figure

MARKERS = "osD^vP*X<>hp"
STYLES = ("-", "--", ":", "-.")
UNSTEERED = "none"
NAMES = {
    "perplexity": "perplexity under the unsteered model",
    "concept_score": "concept score",
    "concept_score_change": "change of the concept score",
    "kl_continuation_nats": "KL to the unsteered model, nats a token",
    "repetition": "share of repeated word trigrams",
}


def plot_steering(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x: str = "perplexity",
    y: str = "concept_score",
    title: str = "",
) -> Path | None:
    """One line a method through its strengths, by way of no steering (a cross); chosen settings have a ring.

    Methods differ by marker as well as by colour, and settings beyond the budget are hollow. Settings that are no
    strengths, such as instructions, have no line.

    Args:
        rows: a curve of the suite, such as `result.curves["reporting"]`.
        path: of the picture, in the format of its ending; written whole or not at all.
        x, y: columns of the curve; a row without one of them is left out. The x axis is logarithmic for perplexity.
        title: above the plot.

    Returns:
        The path; None without matplotlib.

    Raises:
        ValueError: there is no row with both columns, or a format that matplotlib does not write.
    """
    shown = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not shown:
        raise ValueError(f"Expected rows with {x!r} and {y!r}. Received: {len(rows)} rows, none with both.")
    figure = new_figure(7, 5)
    if figure is None:
        return None
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(row["method"] for row in shown if row["method"] != UNSTEERED))
    unsteered = [row for row in shown if row["method"] == UNSTEERED]
    for number, method in enumerate(methods):
        members = [row for row in shown if row["method"] == method]
        marker, style = MARKERS[number % len(MARKERS)], STYLES[number % len(STYLES)]
        path_of = _by_strength(members, unsteered)
        (line,) = axes.plot([row[x] for row in path_of], [row[y] for row in path_of], lw=1, alpha=0.7, ls=style)
        colour = line.get_color()
        for row in members:
            face = colour if row.get("within_budget", True) else "white"
            goals = f" ({', '.join(row['chosen_to'])})" if row.get("chosen_to") else ""
            axes.plot(row[x], row[y], marker=marker, markersize=7, ls="", color=colour, markerfacecolor=face)
            axes.annotate(
                f"{row['setting']}{goals}", (row[x], row[y]), xytext=(9, 6), textcoords="offset points", fontsize=8
            )
            if goals:
                axes.plot(row[x], row[y], marker="o", markersize=15, markerfacecolor="none", color="black")
        axes.plot([], [], marker=marker, color=colour, label=method, ls=style if path_of else "", lw=1)
    for row in unsteered:
        axes.plot(row[x], row[y], marker="x", markersize=10, mew=2, color="black", ls="", label="no steering")
    axes.plot([], [], marker="o", markersize=12, markerfacecolor="none", color="black", ls="", label="chosen")
    axes.plot([], [], marker="s", markerfacecolor="white", color="grey", ls="", label="beyond the budget")
    spread = [row[x] for row in shown]
    if x == "perplexity" and max(spread) > 4 * min(spread) and math.isfinite(max(spread)):
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(y, y), title=title)
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_figure(figure, path)


def _by_strength(rows: Sequence[Mapping[str, Any]], unsteered: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows in the order of their strengths, the unsteered one at 0; none where a setting is not a number."""
    try:
        placed = [(float(str(row["setting"]).removeprefix("x")), row) for row in rows]
    except ValueError:
        return []
    placed += [(0.0, row) for row in unsteered]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]
