"""What a method of comparison is: from test questions to answers towards a side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..answers import AskedModel
from ..learning import LearntFeatures


@dataclass(frozen=True)
class Bench:
    """What a method has at hand.

    Args:
        asked: the model, and how it is asked.
        rows: of the test questions.
        seed: of their demonstrations.
        learnt: what was learnt from the pool.
    """

    asked: AskedModel
    rows: Sequence[int]
    seed: int
    learnt: LearntFeatures

    @cached_property
    def prompts(self) -> list[str]:
        """Of the test questions, with demonstrations without a conflict."""
        return self.asked.prompts(self.rows, self.seed)


class MethodAnswers(NamedTuple):
    """method: as tables have it. side: that it steers to. answers: to the test questions."""

    method: str
    side: str
    answers: list[str]


class Baseline(NamedTuple):
    """A method.

    answer: gives the answers towards each side that was asked for.
    prompts: how many it reads of a question, for each side.
    learns: whether it needs hidden states of the pool's prompts.
    """

    answer: Callable[[Bench], Iterator[MethodAnswers]]
    prompts: int = 1
    learns: bool = False
