"""Of the verb `evaluate`: a table and a picture of what a suite found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.results import Measurement, SuiteResult

# Methods that the others of their metric are compared with; the first that there is.
BASELINES = ("none", "base", "DiffMean", "tree on hidden states", "zeros at", "random latent")


def show_suite(suite: SuiteResult, console: Any) -> None:
    """Every measurement with its interval, its n and, beside it, the baseline of its metric; then the notes."""
    from rich.table import Table

    table = Table(title=f"{suite.name} ({suite.seconds:,.0f} s)")
    for name in ("metric", "of"):
        table.add_column(name, overflow="fold")
    for name in ("value", "95 % interval", "n", "baseline"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for one in sorted(suite.measurements, key=_place(suite.measurements)):
        metric = one.metric + (f", {one.data}" if one.data else "")
        other = baseline(one, suite.measurements)
        interval = "" if one.low is None or one.high is None else f"{_number(one.low)} to {_number(one.high)}"
        table.add_row(
            metric if metric != previous else "", one.method, _number(one.value), interval,
            f"{one.n:,}" if one.n is not None else "", "" if other is None else _number(other.value),
        )  # fmt: skip
        previous = metric
    console.print(table, markup=False)
    for note in suite.notes:
        console.print(f"- {note}", markup=False)


def baseline(one: Measurement, all_of_them: Sequence[Measurement]) -> Measurement | None:
    """What a measurement is compared with; None where it is the baseline itself, or there is none."""
    if one.metric.endswith("_change") or "_minus_" in one.metric:  # compared already
        return None
    for start in BASELINES:
        others = [m for m in all_of_them if (m.metric, m.data) == (one.metric, one.data) and m.baseline is not False]
        same = [m for m in others if m.method.startswith(start)]
        if same:
            return None if one in same else same[0]
    return None


def draw_suite(suite: SuiteResult, folder: Path) -> Path | None:
    """A picture of a suite in a folder; None without matplotlib."""
    from ..evaluation.steering_plot import plot_steering
    from ..evaluation.suite_plot import plot_suite

    path = folder / f"{suite.name}.png"
    if suite.name == "steering" and suite.curves.get("reporting"):
        return plot_steering(list(suite.curves["reporting"]), path)
    return plot_suite(suite, path)


def _place(measurements: Sequence[Measurement]) -> Any:
    """Metrics in the order of their first measurement, each with its methods in theirs."""
    order = {key: i for i, key in reversed(list(enumerate((m.metric, m.data) for m in measurements)))}
    return lambda one: order[one.metric, one.data]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
