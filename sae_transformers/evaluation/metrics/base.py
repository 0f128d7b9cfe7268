"""What the metrics share: the facts that their cards are written from, and tensors from what was gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import evaluate
import torch
from datasets import Features, Sequence, Value
from torch import Tensor

NUMBER, COUNT, TEXT = Value("float64"), Value("int64"), Value("string")
NUMBERS, COUNTS, TEXTS = Sequence(NUMBER), Sequence(COUNT), Sequence(TEXT)


@dataclass(frozen=True)
class MetricFacts:
    """What a metric's card says.

    name: as a file, such as `fvu`. title: as a heading. description: what is measured, with its formula.
    inputs: column -> what it holds; their types are in `features`. values: range, and which end is better.
    limits: what the number does not say. source: where it comes from. options: argument of `compute` -> what it does.
    example: arguments of `compute`, and `answer`, what it gives for them.
    """

    name: str
    title: str
    description: str
    inputs: Mapping[str, str]
    features: Mapping[str, Any]
    values: str
    limits: str
    source: str
    example: Mapping[str, Any]
    answer: Mapping[str, float]
    options: Mapping[str, str] = ()  # pyright: ignore[reportAssignmentType]


class SaeMetric(evaluate.Metric):
    """An `evaluate.Metric` that is described by its `facts`.

    measure: what `compute` does with the columns of `facts.features`, and with its options.
    """

    facts: ClassVar[MetricFacts]
    measure: ClassVar[Callable[..., dict[str, float]]]

    def _info(self) -> evaluate.MetricInfo:
        facts = self.facts
        told = "\n".join(f"    {name}: {what}" for name, what in {**facts.inputs, **dict(facts.options)}.items())
        return evaluate.MetricInfo(
            description=facts.description,
            citation=facts.source,
            inputs_description=f"Args:\n{told}\nReturns:\n    {', '.join(facts.answer)}: {facts.values}",
            features=Features(dict(facts.features)),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **others: Any) -> dict[str, float]:
        usual = {"predictions": predictions, "references": references}
        return self.measure(**{name: usual[name] for name in usual if name in self.facts.features}, **others)


def tensor(column: Iterable[Any], name: str) -> Tensor:
    """A column of numbers (n,), or of equally long lists of them (n, m), float64.

    Raises:
        ValueError: the lists differ in length, or there is none.
    """
    values = list(column)
    lengths = {len(value) if isinstance(value, list) else 1 for value in values}
    if len(lengths) != 1:
        raise ValueError(f"`{name}` must hold rows of one length. Received: lengths {sorted(lengths)[:5]}.")
    return torch.tensor(values, dtype=torch.float64)
