"""Settings of `concept_set`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...create_training_data.concept_recipe import ConceptRecipe
from .llm import LLMSettings


@dataclass(frozen=True)
class ConceptSetSettings:
    """How concept sets are written.

    Args:
        recipe: how much is written for each concept.
        llm: which language model writes.
        dry_run: estimate the cost and end.
    """

    recipe: ConceptRecipe = field(default_factory=ConceptRecipe)
    llm: LLMSettings = field(default_factory=LLMSettings)
    dry_run: bool = False
