"""The measurements of a suite as few small tables: a row a method, a column a metric, or the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..evaluation.results import Measurement, SuiteResult
from .markdown import number

BETTER = {"higher": " ↑", "lower": " ↓", "": ""}


@dataclass
class ResultTable:
    """Metrics that were measured of the same methods on the same data.

    corner: what a row is. head: of the columns. rows: name, then cells. n: in words, where all cells have one.
    """

    data: str
    methods: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Measurement] = field(default_factory=dict)

    @property
    def n(self) -> str:
        found = {(one.n, one.seeds) for one in self.cells.values()}
        if len(found) != 1:
            return ""
        ((n, seeds),) = found
        told = [] if n is None else [f"n = {number(n)}"]
        return ", ".join([*told, f"{seeds} seeds"] if seeds > 1 else told)

    @property
    def by_method(self) -> bool:
        """Whether a row is a method: where there are more of them than metrics."""
        return len(self.methods) >= len(self.metrics)

    def _headed(self, metric: str) -> str:
        found = {one.better for (of, _), one in self.cells.items() if of == metric}
        return metric + (BETTER[found.pop()] if len(found) == 1 else "")

    @property
    def corner(self) -> str:
        return "of" if self.by_method else "metric"

    @property
    def head(self) -> list[str]:
        if self.by_method:
            return [self._headed(metric) for metric in self.metrics]
        return [method or "value" for method in self.methods]

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        if self.by_method:
            return [(of or "-", [self._cell(metric, of) for metric in self.metrics]) for of in self.methods]
        return [(self._headed(metric), [self._cell(metric, of) for of in self.methods]) for metric in self.metrics]

    @property
    def notes(self) -> list[str]:
        """What is said of single numbers, each once with those that it is said of."""
        said: dict[str, dict[str, None]] = {}
        for (metric, method), one in self.cells.items():
            if one.note:
                said.setdefault(one.note, {})[method or metric] = None
        return [f"{', '.join(of)}: {note}" for note, of in said.items()]

    def _cell(self, metric: str, method: str) -> str:
        one = self.cells.get((metric, method))
        if one is None:
            return ""
        shown = number(one.value)
        if one.value is not None and one.low is not None and one.high is not None:
            shown += f" ({number(one.low, 3)} to {number(one.high, 3)})"
        if not self.n:
            shown += "" if one.n is None else f", n = {number(one.n)}"
            shown += "" if one.seeds == 1 else f", {one.seeds} seeds"
        return shown


def result_tables(suite: SuiteResult) -> list[ResultTable]:
    """Group the measurements: a metric joins a table that has all of its methods and at most three times as many."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for one in suite.measurements:
        found.setdefault((one.metric, one.data), {}).setdefault(one.method, one)
    tables: list[ResultTable] = []
    for (metric, data), of in found.items():
        table = next((one for one in tables if one.data == data and _fits(list(of), one.methods)), None)
        if table is None:
            table = ResultTable(data, list(of))
            tables.append(table)
        table.metrics.append(metric)
        table.cells.update({(metric, method): one for method, one in of.items()})
    return tables


def _fits(methods: Sequence[str], there: Sequence[str]) -> bool:
    return set(methods) <= set(there) and 3 * len(methods) >= len(there)
