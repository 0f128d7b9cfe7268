"""Settings of `concept_set` and `concept_data`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...create_training_data.concept_recipe import ConceptRecipe
from ...latents.settings import check_integers, check_numbers
from .llm import LLMSettings

SOURCES = (
    "real_toxicity_prompts", "real_toxicity_prompts_prompt_only", "aegis", "toxic_chat", "wikitext", "shakespeare",
    "table",
)  # fmt: skip


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


@dataclass(frozen=True)
class ConceptDataSettings:
    """Which rows are read, and what their labels are.

    Args:
        concept: name of the label's column. By default the source's own: toxicity, unsafe, shakespeare, label.
        split: part of a Hub data set.
        text_column: of a table, column of the text; a.b is field b of column a.
        label_column: of a table, column of a label or a score; rows without one are unknown, -100.
        threshold: of a table, scores of this and more are 1.
        max_rows: of wikitext, rows that are drawn.
        seed: of the draw.
        others: names of further concepts, of which these rows say nothing: a column of -100 each, so that files of
            several concepts make one harvest.
    """

    concept: str | None = None
    split: str = "train"
    text_column: str = "text"
    label_column: str = "label"
    threshold: float = 0.5
    max_rows: int | None = None
    seed: int = 42
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integers(self, max_rows=1)
        check_numbers(self, "threshold")
