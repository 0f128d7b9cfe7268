"""Draw the plots of docs/results/ from the pages' own tables: `python docs/plot_results.py`, with matplotlib.

Each plot is a column of a table: values by row, with their intervals where the table has them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
MINUS = "−"
NUMBER = r"[-−+]?\d[\d,]*\.?\d*"


class Plot(NamedTuple):
    """What is drawn: of the table whose header has `column`, that column by the first one."""

    page: str
    column: str
    label: str
    rows: str = ""  # a pattern that a row's name must have
    log: bool = False
    mark: float | None = None  # a vertical line


PLOTS = (
    Plot("quickstart", "VADER sentiment of continuations", "VADER sentiment of continuations, by strength"),
    Plot("scar", "RealToxicityPrompts", "AUROC on RealToxicityPrompts"),
    Plot("selfreg-toxicchat", "Δ / std", "effect of swapped identity terms, standard deviations of the logits"),
    Plot("selfreg-dxy", "Δ / std", "effect of swapped gender words, standard deviations of the logits"),
    Plot("knowledge-selection", "EM_C", "exact match with the context's answer"),
    Plot("axbench", "mean", "AUROC, mean over ten concepts", mark=0.5),
    Plot("feature-table", "CPU s", "processor time, s"),
    Plot("gender-bias", "WinoBias 1: gap pro less anti", "WinoBias 1, gap in nats", mark=0.0),
    Plot("topic-alignment", "similarity", "similarity to medical texts"),
    Plot("evaluation-suites", "AUROC", "AUROC for toxic messages", mark=0.5),
    Plot("steering-suite", "change, paired", "change in toxicity, paired", mark=0.0),
    Plot("capability", "steered less wrapped, paired", "accuracy, steered less wrapped", rows="accuracy", mark=0.0),
    Plot("mutual-information-cost", "ratio", "times as fast as scikit-learn"),
    Plot("training-cost", "ms, least", "ms of a training step"),
    Plot("steering-cost", "top-k, prefill of 128", "time to the plain base's, top-k SAE, prefill", mark=1.0),
    Plot("loading-cost", "MB", "memory, MB", log=True),
    Plot("dashboards", "first content", "ms to the first content"),
    Plot("serving", "tokens/s", "tokens a second"),
)


def tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table of a page."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in block.splitlines()
        ]
        found.append((rows[0], rows[2:]))
    return found


def value(cell: str) -> tuple[float, float, float] | None:
    """(value, lower end, upper end) of `0.86`, `0.44 ± 0.20` or `0.86 (0.84 to 0.89)`; None without a number."""
    plain = cell.replace("*", "").replace(MINUS, "-").replace(",", "")
    match = re.match(NUMBER, plain)
    if match is None:
        return None
    middle = float(match[0])
    if around := re.match(rf"{NUMBER} ± (\d+\.?\d*)", plain):
        return middle, middle - float(around[1]), middle + float(around[1])
    if ends := re.match(rf"{NUMBER} \(({NUMBER}) to ({NUMBER})\)", plain):
        return middle, float(ends[1]), float(ends[2])
    return middle, middle, middle


def points(plot: Plot) -> list[tuple[str, tuple[float, float, float]]]:
    """Name and value of each row that is drawn.

    Raises:
        ValueError: the page has no such column, or no number in it.
    """
    text = (DOCS / "results" / f"{plot.page}.md").read_text(encoding="utf-8")
    for header, rows in tables(text):
        if plot.column not in header[1:]:
            continue
        column = header.index(plot.column, 1)
        names = [", ".join(part for part in row[: 2 if plot.page == "serving" else 1] if part) for row in rows]
        found = [
            (re.sub(r"[*`\\]", "", name), number)
            for name, row in zip(names, rows, strict=True)
            if len(row) > column and (number := value(row[column])) and re.search(plot.rows, name)
        ]
        if found:
            return found
    raise ValueError(f"{plot.page} has no table with a column {plot.column!r}.")


def draw(plot: Plot, out: Path) -> None:
    """Write one plot as .svg, with a transparent ground that suits a light page and a dark one."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": plot.page, "font.size": 9, "svg.fonttype": "none"})
    grey = "#808080"
    rows = points(plot)[::-1]
    figure, axes = plt.subplots(figsize=(7.2, 0.6 + 0.26 * len(rows)))
    middles = [middle for _, (middle, _, _) in rows]
    errors = [
        [middle - low for _, (middle, low, _) in rows],
        [high - middle for _, (middle, _, high) in rows],
    ]
    axes.errorbar(middles, range(len(rows)), xerr=errors, fmt="o", color="#009688", ecolor="#009688", markersize=5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], color=grey)
    axes.set_xlabel(plot.label, color=grey)
    axes.tick_params(colors=grey)
    axes.grid(axis="x", color=grey, alpha=0.25)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if plot.log:
        axes.set_xscale("log")
    if plot.mark is not None:
        axes.axvline(plot.mark, color=grey, linewidth=1)
    figure.savefig(out, bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    (DOCS / "images" / "results").mkdir(parents=True, exist_ok=True)
    for each in PLOTS:
        draw(each, DOCS / "images" / "results" / f"{each.page}.svg")
