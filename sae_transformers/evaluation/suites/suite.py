"""What a suite of measurements is, and the registry of them. No torch is imported here: the command line uses it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...latents.settings import ReadingSettings
from ..results import DataFile, Measurement, SuiteResult, compared_with, data_file
from ..settings import BootstrapSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...modeling import SaeForCausalLM
    from ..features.interventions import Embed
    from ..journal import Journal, Watch
    from ..scorers.registry import Ask, Scorer

Report = Callable[[int], object]  # called with how much was done since the last call
MAX_LENGTH = 256  # tokens of a text, or what the model reads if that is less


@dataclass(frozen=True)
class CardFacts:
    """What a model card takes from a suite.

    Args:
        task: of the `model-index`, as the Hub names tasks; empty for the model's own.
        of_model: whether its numbers belong into the `model-index`; False for those of a machine.
        expected: whether the card says so where it was not measured.
        of_features: metrics that the table of features shows of single latents.
        differences: metrics, as a regular expression, that compare or are of what was fitted beside the model, and
            are not in the `model-index`.
    """

    task: str = ""
    of_model: bool = True
    expected: bool = True
    of_features: tuple[str, ...] = ()
    differences: str = r"_change$|_ratio$|_minus_"

    def compares(self, metric: str) -> bool:
        """Whether a metric is a difference, and not a number of the model."""
        return bool(re.search(self.differences, metric))


@dataclass(frozen=True)
class SuiteInputs:
    """What the suites of one run share.

    Args:
        features: SAE, and latent or name of a concept; None for the concepts of the SAEs.
        feature_texts: the same as they were typed, for the record.
        reading: how texts are read. bootstrap: how intervals are drawn.
        ask: makes what sends questions to a language model; an error says that none was chosen.
        judge: name and server of that model, for the record.
        embedder: loads what embeds sentences, (texts) -> (n, d).
    """

    features: tuple[tuple[int, int | str], ...] | None = None
    feature_texts: list[str] | None = None
    reading: ReadingSettings = ReadingSettings(tokens_per_batch=1024)
    bootstrap: BootstrapSettings = BootstrapSettings()
    ask: Callable[[], Ask] | None = None
    judge: Mapping[str, str | None] = field(default_factory=dict)
    embedder: Callable[[], Embed] | None = None

    def sentences(self) -> Embed:
        """What embeds sentences.

        Raises:
            ValueError: nothing here does.
        """
        if self.embedder is None:
            raise ValueError("similarity='sentences' needs what embeds them. Received: none.")
        return self.embedder()

    def scorer(self, name: str, labelled: tuple[Sequence[str], Sequence[str]] | None = None) -> Scorer:
        """A scorer by its name; a judge asks the language model. labelled: for `words`, see `get_scorer`."""
        from ..scorers.registry import get_scorer

        ask = self.ask() if name.startswith("judge:") and self.ask is not None else None
        return get_scorer(name, labelled=labelled, ask=ask, seed=self.bootstrap.seed)

    def told(self, *names: str) -> dict[str, Any]:
        """Some of `max_length`, `skip_first`, `tokens_at_once`, `resamples`, `seed`, as a record keeps them."""
        everything = {
            "max_length": self.reading.max_length or MAX_LENGTH,
            "skip_first": self.reading.skip_first,
            "tokens_at_once": self.reading.tokens_per_batch,
            "resamples": self.bootstrap.resamples,
            "seed": self.bootstrap.seed,
        }
        return {name: everything[name] for name in names or everything}


@dataclass(frozen=True)
class Suite(ABC):
    """Measurements that belong together: data and settings, ready to be run on a model.

    A suite is a frozen dataclass in a file of its own, and a line in `suites/__init__.py`. Class attributes:

    - `Options`: a dataclass whose fields become options of the verb `evaluate`, under its `PANEL`.
    - `needs`: those of them of which one must be given; a suite without any runs unless it waits to be asked for.
    - `unasked`: whether it runs where no suite is named.
    - `card`: what a model card takes from it.

    Args:
        asked: every option that the numbers depend on, as JSON; by default the fields that are no data.
        data: what was read, or the paths of its files; by default a hash of the fields that `texts` names.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type]
    needs: ClassVar[tuple[str, ...]] = ()
    unasked: ClassVar[bool] = True
    card: ClassVar[CardFacts] = CardFacts()
    texts_of: ClassVar[tuple[str, ...]] = ()  # fields that are data

    asked: Mapping[str, Any] | None = field(default=None, kw_only=True)
    data: Sequence[DataFile | str | Path] | None = field(default=None, kw_only=True)

    @classmethod
    @abstractmethod
    def read(cls, options: Any, inputs: SuiteInputs) -> Suite:
        """The suite with its data, from an instance of `Options`.

        Raises:
            ValueError: an option or a row of the data is not what it must be.
            OSError: a file is not there.
        """

    @abstractmethod
    def measure(self, model: SaeForCausalLM, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> SuiteResult:
        """Measure, without gradients.

        Args:
            watch: is told of what is done; a suite that takes long keeps its parts there, and takes those done before.
        """

    def __call__(
        self,
        model: SaeForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        report: Report | None = None,
        journal: Journal | None = None,
    ) -> SuiteResult:
        """Measure, and say how long it took.

        Args:
            model: in eval mode; its default steering is what steers.
            tokenizer: of the base.
            report: called with how much was done since the last call, see `steps`.
            journal: has the parts that were done before, and gets the others.
        """
        import torch

        from ..journal import Watch

        start = time.perf_counter()
        with torch.no_grad():
            found = self.measure(model, tokenizer, Watch(report, journal))
        return replace(found, seconds=time.perf_counter() - start)

    def steps(self, model: SaeForCausalLM) -> int | None:
        """The sum of what `report` will be called with; None where that is not known."""
        return None

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Everything that the numbers depend on beside the model and the data, as JSON."""
        if self.asked is not None:
            return dict(self.asked)
        names = [one.name for one in dataclasses.fields(self) if one.name not in ("asked", "data", *self.texts_of)]
        return {name: plain for name in names if (plain := _plain(getattr(self, name))) is not None}

    def files(self) -> list[DataFile]:
        """What is measured on."""
        if self.data is not None:
            return [one if isinstance(one, DataFile) else data_file(one) for one in self.data]
        return [source_file(name, getattr(self, name), None) for name in self.texts_of if getattr(self, name)]

    @classmethod
    def rows(cls, result: SuiteResult) -> list[dict[str, Any]]:
        """How it is shown: each measurement with its interval and, beside it, what it is compared with."""
        order = {key: i for i, key in reversed(list(enumerate((m.metric, m.data) for m in result.measurements)))}
        return [
            _row(one, compared_with(one, result.measurements))
            for one in sorted(result.measurements, key=lambda one: order[one.metric, one.data])
        ]

    @classmethod
    def beside(cls, result: SuiteResult) -> Mapping[str, Any]:
        """What is written beside the record: name of a file -> JSON."""
        return {}

    @classmethod
    def plot(cls, result: SuiteResult, path: str | Path) -> Path | None:
        """A picture of what was found; None without matplotlib."""
        from .plot import plot_suite

        return plot_suite(result, path)


SUITES: dict[str, type[Suite]] = {}


def register_suite(name: str, suite: type[Suite]) -> None:
    """Make a suite known: to the verb `evaluate` with its options, to records, plots and model cards."""
    suite.name = name
    SUITES[name] = suite


def suite_of(name: str) -> type[Suite]:
    """The suite of a record; one that is not known here is shown as suites are."""
    return SUITES.get(name, Suite)


def card_facts(name: str) -> CardFacts:
    """What a card takes from a suite of a record."""
    return suite_of(name).card


def expected_suites() -> list[str]:
    """Suites of which a card says whether they were measured."""
    return [name for name, suite in SUITES.items() if suite.card.expected]


def source_file(source: str | Path, rows: Any, n: int | None) -> DataFile:
    """Name and hash of a file; of a folder, a glob or a Hub data set the hash of what was read."""
    if Path(source).is_file():
        return data_file(source, rows=n)
    told = json.dumps(rows, ensure_ascii=True, default=str).encode()
    name = Path(source).name if Path(source).exists() else str(source)
    return DataFile(name, hashlib.sha256(told).hexdigest(), n)


def _row(one: Measurement, other: Measurement | None) -> dict[str, Any]:
    return {
        "metric": one.metric + (f", {one.data}" if one.data else ""),
        "of": one.method,
        "value": number_text(one.value),
        "95 % interval": (
            "" if one.low is None or one.high is None else f"{number_text(one.low)} to {number_text(one.high)}"
        ),
        "n": "" if one.n is None else f"{one.n:,}",
        "baseline": "" if other is None else number_text(other.value),
    }


def number_text(value: float | None) -> str:
    """A number in few digits."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """A field as JSON; None for what has no form of its own, such as a tensor."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        return json.loads(json.dumps(value, default=_part))
    except TypeError:
        return None


def _part(value: Any) -> Any:
    """What is in a field, such as a list of methods: of a dataclass its kind and fields, of a function its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **dataclasses.asdict(value)}
    if name := getattr(value, "__qualname__", None):
        return f"{value.__module__}.{name}"
    raise TypeError(f"{type(value).__name__} has no form in JSON")
