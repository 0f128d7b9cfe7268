"""Choose op, SAE, latent and strength by what they do to generated text, while the text stays likely.

    found = calibrate(model, tokenizer, prompts, scorer, ladders_of([(0, 17), (0, 402)]))
    model.steering = found.steering

The prompts are split: one part chooses, the other reports. AxBench (https://huggingface.co/papers/2501.17148) chooses
a factor for each concept in this way, on half of its instructions.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...evaluation.generation.continuations import Continuations, continue_prompts
from ...evaluation.generation.fluency import repetition
from ...evaluation.journal import Journal
from ...evaluation.scorers.registry import Scorer, checked_scores
from ...evaluation.settings import FluencyBudget, GenerationSettings
from ...latents.progress import Count, Progress
from ...modeling import FeatureEdit, Steering
from ...modeling.feature_edits import WITHOUT_VALUE
from .settings import STRENGTHS

Ladder = Sequence[Steering]  # from weak to strong


@dataclass(frozen=True)
class SteeringPoint:
    """Continuations under one steering, measured.

    score: mean of the scorer, and its standard error over prompts. perplexity: of the unsteered model on them.
    repetition: share of word trigrams that repeat earlier ones. within_budget: whether it may be chosen.
    """

    steering: Steering
    score: float
    score_error: float
    perplexity: float
    repetition: float
    within_budget: bool = True

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("score", "score_error", "perplexity", "repetition")}
        return {"steering": self.steering.to_dict(), **numbers, "within_budget": self.within_budget}


@dataclass(frozen=True)
class Calibration:
    """What a search found.

    steering: the best; empty where nothing within the budget scored above the unsteered model.
    unsteered, curve: on the prompts that chose: without steering, and every steering that was tried.
    report: without and with the chosen steering on the other prompts; None where there are none.
    """

    steering: Steering
    unsteered: SteeringPoint
    curve: tuple[SteeringPoint, ...]
    report: tuple[SteeringPoint, SteeringPoint] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "steering": self.steering.to_dict(),
            "unsteered": self.unsteered.to_dict(),
            "curve": [point.to_dict() for point in self.curve],
            "report": self.report and [point.to_dict() for point in self.report],
        }


def ladders_of(
    features: Sequence[tuple[int, int | str]],
    ops: Sequence[str] = ("direction", "set"),
    *,
    strengths: Mapping[str, Sequence[float]] | None = None,
    lower: bool = False,
    unit: str = "norm",
    positions: Any = "all",
    keep_error: bool = True,
) -> list[list[Steering]]:
    """Steerings from weak to strong, a list for each op and latent.

    Args:
        features: (number of the SAE, latent) pairs.
        ops: of `direction`, `set`, `at_least` (in `unit`), `scale` (factors), `ablate` and `erase` (one rung).
        strengths: op -> its values from weak to strong, in place of `STRENGTHS`.
        lower: move away from the latent: values become negative, for `scale` after a 0.
        unit: of all but `scale`, `ablate` and `erase`.
        positions, keep_error: of `Steering`.

    Raises:
        ValueError: no feature or op, an op without strengths.
    """
    chosen = {**STRENGTHS, **(strengths or {})}
    if not features or not ops or any(op not in WITHOUT_VALUE and not chosen.get(op) for op in ops):
        raise ValueError(
            f"Expected features and ops of {', '.join((*STRENGTHS, *WITHOUT_VALUE))}, or others with `strengths`. "
            f"Received: {len(features)} features, ops={tuple(ops)!r}."
        )
    ladders = []
    for op in ops:
        values: list[float | None] = [None]
        if op not in WITHOUT_VALUE:
            values = [-value if lower else value for value in chosen[op]]
            values = [0.0, *values] if lower and op == "scale" else values
        of_op = "absolute" if op in ("scale", *WITHOUT_VALUE) else unit
        ladders += [
            [
                Steering([FeatureEdit(sae, feature, op, value, of_op)], positions=positions, keep_error=keep_error)
                for value in values
            ]
            for sae, feature in features
        ]
    return ladders


def calibrate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    ladders: Sequence[Ladder],
    generation: GenerationSettings | None = None,
    budget: FluencyBudget | None = None,
    *,
    report_share: float = 0.5,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Calibration:
    """The steering that scores highest on held-out prompts among those that keep the text likely.

    The rungs of all ladders are tried together, the weakest first; a ladder ends with its first rung beyond the
    budget. Among equals the one with the lower perplexity is chosen, then the earlier one.

    Args:
        model: a `SaeForCausalLM`.
        tokenizer: of the base.
        prompts: as the model reads them; see `evaluation.generation.continuations.chat_prompts`.
        scorer: texts -> a finite number for each, higher for more of what is wanted. It sees continuations only.
        ladders: steerings from weak to strong, as `ladders_of` makes them.
        generation: of the continuations, and the seed of the split; all steerings see the same noise. The prompts are
            taken as they are, so `chat` does not count.
        budget: what a steering may cost.
        report_share: of the prompts, drawn by the seed, that do not choose but report.
        progress: called with the continuations that are done, and how many there will be at most.
        journal: has the continuations of a run that was stopped, and gets the others.

    Returns:
        The steering and the whole curve. Where no rung is within the budget or none scores above the unsteered
        model, the steering is empty, and a warning says so.

    Raises:
        ValueError: no ladder, an empty one, a steering that the model does not have, prompts that do not fit, too few
            of them, or a scorer that gives another number of scores or one that is not finite.
    """
    if not ladders or not all(len(ladder) for ladder in ladders):
        raise ValueError(f"Expected ladders with a steering each. Received: {[len(ladder) for ladder in ladders]}.")
    if not 0 <= report_share < 1:
        raise ValueError(f"`report_share` must be in [0, 1). Received: report_share={report_share!r}.")
    generation, budget = generation or GenerationSettings(), budget or FluencyBudget()
    model.prepare_steering([steering for ladder in ladders for steering in ladder])  # tells of features it has not
    search, held = split_prompts(prompts, report_share, generation.seed)
    bench = _Bench(model, tokenizer, scorer, generation, journal, progress)
    bench.count.total = (1 + sum(map(len, ladders))) * len(search) * generation.samples_per_prompt
    (unsteered,) = bench.measure(search, [Steering()])
    least_likely = budget.perplexity_ratio * unsteered.perplexity
    most_repeated = math.inf if budget.added_repetition is None else unsteered.repetition + budget.added_repetition
    curve: list[SteeringPoint] = []
    going = [list(ladder) for ladder in ladders]
    while going:
        rungs = [
            replace(point, within_budget=point.perplexity <= least_likely and point.repetition <= most_repeated)
            for point in bench.measure(search, [ladder[0] for ladder in going])
        ]
        curve += rungs
        going = [ladder[1:] for ladder, p in zip(going, rungs, strict=True) if p.within_budget and len(ladder) > 1]
    allowed = [point for point in curve if point.within_budget and point.score > unsteered.score]
    best = max(allowed, key=lambda point: (point.score, -point.perplexity), default=None)
    if best is None:
        within = sum(point.within_budget for point in curve)
        warnings.warn(
            f"No steering was chosen: of {len(curve)} tried, {within} are within {budget.perplexity_ratio:g} times "
            "the unsteered perplexity, and none of these scores above the unsteered model.",
            stacklevel=2,
        )
    chosen = Steering() if best is None else best.steering
    bench.count.total = bench.count.done + 2 * len(held) * generation.samples_per_prompt
    report = None
    if held:
        first, second = bench.measure(held, [Steering(), chosen])
        report = (first, second)
    return Calibration(chosen, unsteered, tuple(curve), report)


def split_prompts(prompts: Sequence[str], report_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Prompts that choose and prompts that report, at random, each in their order; a prompt that is there several
    times is in one of them only.

    Raises:
        ValueError: there is none left to choose, or none to report where some should.
    """
    different = list(dict.fromkeys(prompts))
    n_report = round(report_share * len(different))
    if isinstance(prompts, str) or len(different) <= n_report or (report_share > 0 and not n_report):
        raise ValueError(
            f"Expected prompts to choose by and prompts to report on. "
            f"Received: {len(prompts)} prompts, {len(different)} of them different, report_share={report_share!r}."
        )
    held = {different[i] for i in random.Random(seed).sample(range(len(different)), n_report)}
    return [p for p in prompts if p not in held], [p for p in prompts if p in held]


class _Bench:
    """Continues prompts under steerings and measures each."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scorer: Scorer,
        generation: GenerationSettings,
        journal: Journal | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.tokenizer, self.scorer = model, tokenizer, scorer
        self.generation, self.journal, self.count = generation, journal, Count(progress, 0)  # of continuations

    def measure(self, prompts: Sequence[str], steerings: Sequence[Steering]) -> list[SteeringPoint]:
        rows = [prompt for prompt in prompts for _ in range(self.generation.samples_per_prompt)]
        found = continue_prompts(
            self.model,
            self.tokenizer,
            rows * len(steerings),
            [steering for steering in steerings for _ in rows],
            self.generation,
            draws=list(range(len(rows))) * len(steerings),
            report=self.count,
            journal=self.journal,
        )
        scores = checked_scores(self.scorer, found.texts)
        points = []
        for number, steering in enumerate(steerings):
            members = range(number * len(rows), (number + 1) * len(rows))
            points.append(self._point(steering, found.take(members), scores[list(members)]))
        return points

    def _point(self, steering: Steering, found: Continuations, scores: Tensor) -> SteeringPoint:
        by_prompt = scores.view(-1, self.generation.samples_per_prompt).mean(1)
        error = float(by_prompt.std() / len(by_prompt) ** 0.5) if len(by_prompt) > 1 else 0.0
        return SteeringPoint(steering, float(scores.mean()), error, found.perplexity, repetition(found.texts))
