"""The record of an evaluation, one JSON file: what was measured, on what, with what, by which command.

Every suite of `sae-transformers evaluate` returns a `SuiteResult`; the file holds one of each suite. Tables, plots and
model cards read it and nothing else, so a number on a card is a number that was measured.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..latents.output_files import whole_file
from ..latents.safe_texts import without_logins
from .method_ids import COMPARED, MethodId, old_method

FORMAT = "sae_transformers.evaluation/1"
PACKAGES = ("sae-transformers", "torch", "transformers", "datasets", "peft", "scikit-learn", "lm-eval")
DIRECTIONS = ("higher", "lower", "")


@dataclass(frozen=True)
class Measurement:
    """One number.

    metric: its name, with the unit in it where there is one, such as `ce_loss_nats`.
    value: None where it is not defined, such as the AUROC of one class; `note` says why.
    method: what it is of, where methods are compared: `none`, `prompt`, `diffmean`, `latent 17`; else empty.
    low, high: ends of the 95 % interval, whose kind is in `interval`, such as `bootstrap over texts`.
    n: how many texts, tokens or pairs it is over.
    data: name of its `DataFile`, or of a data set.
    better: `higher`, `lower`, or empty where neither is.
    baseline: whether the method needs nothing of the SAEs' features and is what others are compared with; None in
        older records, where the method's name says it: see `is_baseline`.
    of: the method as data; None in older records, see `method_of`.
    """

    metric: str
    value: float | None
    method: str = ""
    low: float | None = None
    high: float | None = None
    interval: str = ""
    n: int | None = None
    seeds: int = 1
    data: str = ""
    better: str = ""
    note: str = ""
    baseline: bool | None = None
    of: MethodId | None = None

    def __post_init__(self) -> None:
        if self.better not in DIRECTIONS:
            raise ValueError(f"`better` must be higher, lower or empty. Received: better={self.better!r}.")
        for name in ("value", "low", "high"):  # JSON has no nan: what is not defined is null, in memory too
            number = getattr(self, name)
            if number is not None:
                object.__setattr__(self, name, float(number) if math.isfinite(number) else None)


def method_of(one: Measurement) -> MethodId:
    """What a measurement is of; of an older record, what its label says."""
    return one.of or old_method(one.method, one.baseline)


def is_baseline(one: Measurement) -> bool:
    """Whether a measurement is of a baseline."""
    return method_of(one).baseline if one.baseline is None else one.baseline


def with_methods(measurements: Iterable[Measurement], methods: Iterable[MethodId]) -> list[Measurement]:
    """The measurements, each with its method as data, found by its label.

    Raises:
        KeyError: a measurement whose method is not among them.
    """
    known = {method.label: method for method in methods}
    return [replace(one, of=known[one.method], baseline=known[one.method].baseline) for one in measurements]


def compared_with(one: Measurement, measurements: Sequence[Measurement]) -> Measurement | None:
    """What a measurement is compared with; None where it is the baseline itself, or there is none."""
    if one.metric.endswith("_change") or "_minus_" in one.metric:  # compared already
        return None
    others = [(method_of(m).kind, m) for m in measurements if (m.metric, m.data) == (one.metric, one.data)]
    for kind in COMPARED:
        if same := [m for of, m in others if of == kind]:
            return None if one in same else same[0]
    return None


@dataclass(frozen=True)
class DataFile:
    """What was measured on. sha256: of the file's bytes. origin, licence: where known."""

    name: str
    sha256: str
    rows: int | None = None
    split: str = ""
    origin: str = ""
    licence: str = ""


@dataclass(frozen=True)
class SuiteResult:
    """What one suite found.

    settings: everything that its numbers depend on, as JSON; a run with equal settings need not be repeated.
    curves: name -> rows of a table, such as a point a strength.
    samples: texts to show beside the numbers, such as steered and unsteered answers; empty unless asked for.
    notes: what a reader must know, such as tokens left out or choices made on the same data.
    """

    name: str
    settings: Mapping[str, Any]
    measurements: Sequence[Measurement]
    data: Sequence[DataFile] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    seconds: float = 0.0

    def value(self, metric: str, method: str = "") -> float | None:
        """The value of one measurement.

        Raises:
            KeyError: there is none of this name and method.
        """
        for one in self.measurements:
            if (one.metric, one.method) == (metric, method):
                return one.value
        known = sorted({(one.metric, one.method) for one in self.measurements})
        raise KeyError(f"No such measurement. Received: {(metric, method)!r}; there are {known}.")


@dataclass(frozen=True)
class Results:
    """The whole record. model: what was measured, such as its name, base, revision and SAEs. created: UTC."""

    model: Mapping[str, Any]
    command: str
    created: str
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def with_suite(self, suite: SuiteResult) -> Results:
        return replace(self, suites={**self.suites, suite.name: suite})

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        suites = {
            name: {**asdict(suite), "measurements": [_told(one) for one in suite.measurements]}
            for name, suite in self.suites.items()
        }
        whole = {"format": FORMAT, **asdict(replace(self, suites={})), "suites": suites}
        ordered = {"format": FORMAT, **{one.name: whole[one.name] for one in fields(self)}}
        return json.loads(json.dumps(ordered, allow_nan=False))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Results:
        """From what `to_dict` gave, or a JSON file of it.

        Raises:
            ValueError: another format, or a field that is missing or unknown.
        """
        if not isinstance(given, Mapping) or given.get("format") != FORMAT:
            found = given.get("format") if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"Expected an evaluation record of format {FORMAT!r}. Received: format={found!r}.")
        rest = {name: value for name, value in given.items() if name != "format"}
        suites = {name: _suite(suite) for name, suite in dict(rest.get("suites", {})).items()}
        return _made(cls, {**rest, "suites": suites})


def write_results(results: Results, path: str | Path) -> Path:
    """Write the record whole or not at all. Returns the path."""
    path = Path(path)
    text = without_logins(json.dumps(results.to_dict(), indent=2, ensure_ascii=False))
    with whole_file(path) as draft:
        draft.write_text(text + "\n", encoding="utf-8")
    return path


def read_results(path: str | Path) -> Results:
    """The record that `write_results` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the results.json of `sae-transformers evaluate`. Received: {str(path)!r}, which is not there."
        )
    try:
        return Results.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def data_file(path: str | Path, **facts: Any) -> DataFile:
    """Name and hash of a file; `facts` are the other fields."""
    path = Path(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return DataFile(path.name, digest.hexdigest(), **facts)


def versions() -> dict[str, str]:
    """Of Python and of the packages whose version can change a number, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _suite(given: Mapping[str, Any]) -> SuiteResult:
    measured = [_measurement(one) for one in given.get("measurements", ())]
    return _made(SuiteResult, {**given, "measurements": measured, "data": [_made(DataFile, d) for d in given["data"]]})


def _told(one: Measurement) -> dict[str, Any]:
    rest = {name: value for name, value in asdict(one).items() if name != "of"}
    return rest if one.of is None else {**rest, "of": one.of.to_dict()}


def _measurement(given: Mapping[str, Any]) -> Measurement:
    one = _made(Measurement, {**given, "of": None})
    if given.get("of") is None:
        return one
    return replace(one, of=_made(MethodId, {**given["of"], "label": one.method, "baseline": bool(one.baseline)}))


def _made(kind: Any, given: Mapping[str, Any]) -> Any:
    names = {one.name for one in fields(kind)}
    if unknown := sorted(set(given) - names):
        raise ValueError(f"A {kind.__name__} has the fields {sorted(names)}. Received also: {unknown}.")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"An incomplete {kind.__name__}: {error}. Received: {sorted(given)}.") from error
