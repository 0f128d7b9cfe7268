"""Settings of `steer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ...evaluation.settings import FluencyBudget, GenerationSettings
from ...latents.settings import ReadingSettings, check_choice
from ...training.steering.settings import SearchSettings, StrengthSettings
from .llm import LLMSettings

SCORERS = ("words", "vader", "toxicity", "judge")


@dataclass(frozen=True)
class ScoringSettings:
    """How much of the concept a continuation has.

    Args:
        scorer: who scores continuations: `words` (a classifier of words, fitted to half of the texts), `vader`,
            `toxicity`, or `judge`, a language model.
        judge_concept: what the judge looks for, in words; by default the concept's name.
    """

    PANEL: ClassVar[str] = "Scoring"

    scorer: str = "words"
    judge_concept: str | None = None

    def __post_init__(self) -> None:
        check_choice(self, "scorer", SCORERS)


@dataclass(frozen=True)
class SteerSettings:
    """How features are found, tried and chosen.

    Args:
        search: which features are tried.
        strength: what is done with them, and how strongly.
        budget: what steered text may lose.
        scoring: how much of the concept a continuation has.
        generation: how prompts are continued; its seed is of every random choice.
        reading: how the labelled texts are read.
        llm: which language model judges.
        journal: file that keeps the continuations of a run that is stopped, so that the same call goes on from there.
    """

    search: SearchSettings = field(default_factory=SearchSettings)
    strength: StrengthSettings = field(default_factory=StrengthSettings)
    budget: FluencyBudget = field(default_factory=FluencyBudget)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    llm: LLMSettings = field(default_factory=LLMSettings)
    journal: Path | None = None

    def __post_init__(self) -> None:
        if self.scoring.scorer == "judge" and self.llm.llm is None and self.llm.local_model is None:
            raise ValueError("`scorer` judge needs `llm`, a model's name at the server, or `local_model`.")
