"""Measure the steering of each side on the test questions, beside other methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ....evaluation.knowledge import knowledge_metrics
from ....modeling import Steering
from .answers import AskedModel, MaybeSteering, share
from .baselines.baseline import Bench
from .baselines.registry import METHODS
from .learning import LearntFeatures


def prompts_per_question(baselines: Sequence[str], sides: int) -> int:
    """How many prompts `compare_methods` reads for a question."""
    return 2 + 2 * sides + sides * sum(METHODS[name].prompts for name in baselines)


def needs_states(baselines: Sequence[str]) -> bool:
    """Whether one of the methods learns from the pool's hidden states."""
    return any(METHODS[name].learns for name in baselines)


def compare_methods(
    asked: AskedModel, rows: Sequence[int], seed: int, steering: Mapping[str, Steering], learnt: LearntFeatures
) -> dict[str, dict[str, float]]:
    """Method -> metrics, with one choice of demonstrations. First those that need no training, side by side.

    Args:
        rows: of the questions to measure on.
        seed: of the demonstrations.
        steering: towards each side.
        learnt: from the pool.
    """
    bench, settings = Bench(asked, rows, seed, learnt), asked.settings
    before = asked.behaviours(rows, asked.answers(bench.prompts))
    steered: dict[str, MaybeSteering] = {"none": False, **{f"SpARE, to {side}": steering[side] for side in steering}}
    methods: dict[str, dict[str, float]] = {}
    for method, edits in steered.items():
        after = before if edits is False else asked.behaviours(rows, asked.answers(bench.prompts, steering=edits))
        likelier = share(asked.prefers_memory(rows, bench.prompts, edits))
        methods[method] = {**knowledge_metrics(after, before), "prefers_memory": likelier}
    chosen = [METHODS[name] for name in METHODS if name in settings.baselines]
    told = [(one.learns, settings.sides.index(found.side), found) for one in chosen for found in one.answer(bench)]
    for _, _, found in sorted(told, key=lambda one: one[:2]):
        metrics = knowledge_metrics(asked.behaviours(rows, found.answers), before)
        methods[f"{found.method}, to {found.side}"] = {**metrics, "prefers_memory": math.nan}
    return methods
