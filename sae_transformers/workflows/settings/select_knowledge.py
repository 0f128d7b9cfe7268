"""Settings of `select_knowledge`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ...latents.named_configs import read_named_config
from ...latents.settings import check_choice, check_integers, check_numbers

CONFIGS = Path(__file__).parents[2] / "training/steering/configs"
OF_MODEL = ("model", "sae")  # of a config: not settings
SIDES: tuple[str, ...] = ("context", "memory")
BASELINES = ("demonstrations", "instruction", "cad", "dola", "vectors", "sea")
SCORINGS = ("exact", "in_context")
GROUPINGS = ("auto", "answers", "likelihood")
WEIGHTINGS = ("mean", "loss")
ACTIVATIONS = ("own", "relu")


@dataclass(frozen=True)
class QuestionSplitSettings:
    """Which questions are learnt from, chosen on and measured on.

    Args:
        test: questions to measure on.
        dev: questions to choose the proportion and the strength on.
        pool: questions to learn from and to take demonstrations from.
        shots: demonstrations before a question.
        seeds: seeds of the demonstrations in the test; each is one measurement.
        split_seed: seed of the split into pool, dev and test.
        max_context: characters of a context; questions with a longer one are left out.
    """

    PANEL: ClassVar[str] = "Questions"

    test: int = 200
    dev: int = 60
    pool: int = 128
    shots: int = 3
    seeds: tuple[int, ...] = (42, 43, 44)
    split_seed: int = 42
    max_context: int = 600

    def __post_init__(self) -> None:
        check_integers(self, test=1, dev=0, pool=1, shots=0, split_seed=0, max_context=1)
        if not self.seeds:
            raise ValueError(f"`seeds` needs a seed or more. Received: seeds={self.seeds!r}.")


@dataclass(frozen=True)
class FeatureSelectionSettings:
    """How the features of both behaviours are found, and which of them are edited, by how much.

    Args:
        proportions: share of the information that the selected features hold (K), in (0, 1); of several, each is
            tried on the dev questions.
        strengths: multiples of a feature's typical activation that edits aim at (alpha); of several, each is tried.
        layers: sets of SAEs by number, such as `0+1,0`; each is tried. By default all SAEs together.
        max_broken: by how much the share of dev questions with neither answer may rise, 0 to 1.
        grouping: how prompts are grouped into the two behaviours: by the `answers` given, by the `likelihood` of both
            answers, or `auto`, by likelihood where fewer than 20 prompts have one of the answers.
        weighting: weights of prompts in a feature's typical activation: `mean`, or `loss` as in SpARE.
        activation: the SAE's `own`, or `relu`: without its selection, as SpARE has it.
        legacy: count the information of dead latents too, as SpARE's code does.
    """

    PANEL: ClassVar[str] = "Features"

    proportions: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    strengths: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    layers: tuple[str, ...] = ()
    max_broken: float = 0.1
    grouping: str = "auto"
    weighting: str = "mean"
    activation: str = "own"
    legacy: bool = False

    def __post_init__(self) -> None:
        if not self.proportions or not all(0 < share < 1 for share in self.proportions):
            raise ValueError(f"`proportions` must be in (0, 1). Received: proportions={self.proportions!r}.")
        if not self.strengths or not all(strength >= 0 for strength in self.strengths):
            raise ValueError(f"`strengths` must be 0 or more. Received: strengths={self.strengths!r}.")
        check_numbers(self, "max_broken", least=0)
        if self.max_broken > 1:
            raise ValueError(f"`max_broken` must be a share, 0 to 1. Received: max_broken={self.max_broken!r}.")
        check_choice(self, "grouping", GROUPINGS)
        check_choice(self, "weighting", WEIGHTINGS)
        check_choice(self, "activation", ACTIVATIONS)

    @property
    def n_tried(self) -> int:
        """How many settings are tried; one is taken without a trial."""
        return len(self.proportions) * len(self.strengths) * max(1, len(self.layers))


@dataclass(frozen=True)
class PublishedKnowledgeSettings:
    """Published files to start from, in place of learning all anew.

    Args:
        features: folder of a published cache: mutual information and expectation of each layer, and functional values
            where they are; without questions the features are selected from it, and no model is needed.
        feature_layers: its layers, in the order of the SAEs; by default all, ascending, or those of the model's SAEs.
        grouped: prompts grouped by their answers, as SpARE publishes them and as this verb writes them: a .json, or a
            folder of some; the questions are those that they number.
    """

    PANEL: ClassVar[str] = "Published files"

    features: str | None = None
    feature_layers: tuple[int, ...] = ()
    grouped: str | None = None

    def __post_init__(self) -> None:
        if self.feature_layers and self.features is None:
            raise ValueError(
                f"`feature_layers` are those of `features`. Received: feature_layers={self.feature_layers!r} and no "
                f"features."
            )


@dataclass(frozen=True)
class SelectKnowledgeSettings:
    """How a model is made to answer from its context or from memory, and how that is measured.

    Args:
        questions: which are learnt from, chosen on and measured on.
        selection: which features are edited.
        scoring: when an answer is the context's: `exact`, or `in_context` as SpARE scores Macnoise.
        baselines: methods to compare with: demonstrations, instruction, cad, dola, vectors, sea; empty for none.
        max_new_tokens: tokens of an answer.
        tokens_per_batch: tokens of a forward pass, padding counted. It changes results by rounding only.
        towards: sides to steer to: context, memory, or both.
        published: what is started from.
    """

    questions: QuestionSplitSettings = field(default_factory=QuestionSplitSettings)
    selection: FeatureSelectionSettings = field(default_factory=FeatureSelectionSettings)
    scoring: str = "exact"
    baselines: tuple[str, ...] = ("demonstrations", "instruction", "cad", "vectors")
    max_new_tokens: int = 12
    tokens_per_batch: int = 8192
    towards: tuple[str, ...] = SIDES
    published: PublishedKnowledgeSettings = field(default_factory=PublishedKnowledgeSettings)

    def __post_init__(self) -> None:
        check_choice(self, "scoring", SCORINGS)
        if not self.towards or set(self.towards) - set(SIDES):
            raise ValueError(f"`towards` is {' or '.join(SIDES)}, or both. Received: towards={self.towards!r}.")
        if unknown := sorted(set(self.baselines) - set(BASELINES)):
            raise ValueError(f"`baselines` are {', '.join(BASELINES)}. Received: {unknown}.")
        check_integers(self, max_new_tokens=1, tokens_per_batch=1)
        if self.selection.n_tried > 1 and self.questions.dev < 1:
            raise ValueError(
                f"`dev` needs questions to choose between {self.selection.n_tried} settings on. "
                f"Received: dev={self.questions.dev!r}."
            )

    @classmethod
    def from_config(cls, config: str | Path, **changes: Any) -> SelectKnowledgeSettings:
        """The settings of a config, such as `spare-llama-2-7b`: those that SpARE published for a model.

        Args:
            config: see `knowledge_config`, which also says which model and SAEs they are for.
            changes: values in place of the config's, by the names of fields, wherever in the settings these are.

        Raises:
            FileNotFoundError: there is no such config.
            ValueError: it is not as expected, or there is no such field.
        """
        values = {**knowledge_config(config), **changes}
        parts: dict[str, type] = {
            "questions": QuestionSplitSettings,
            "selection": FeatureSelectionSettings,
            "published": PublishedKnowledgeSettings,
        }
        _check_names(changes, without=OF_MODEL)
        made = {part: kind(**_taken(kind, values)) for part, kind in parts.items()}
        return cls(**{name: value for name, value in _taken(cls, values).items() if name not in parts}, **made)

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides of `towards`, each once, context first."""
        return tuple(side for side in SIDES if side in self.towards)


def check_side(
    side: str | None, sides: tuple[str, ...], name: str = "save_model", *, without: str | None = None
) -> None:
    """
    Args:
        without: what is missing to steer a model at all.

    Raises:
        ValueError: neither None nor a side that a model can be steered to; it names the argument.
    """
    if side is not None and without is not None:
        raise ValueError(f"`{name}` needs {without}: no model is read without. Received: {name}={side!r}.")
    if side is not None and side not in sides:
        raise ValueError(f"`{name}` must be one of {', '.join(sides)}. Received: {name}={side!r}.")


def knowledge_config(config: str | Path) -> dict[str, Any]:
    """Values by the names of fields, and `model` and `sae`, the base and the SAEs that they are for.

    Args:
        config: a YAML file, or the name of one of the library's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or holds another name.
    """
    values = read_named_config(config, CONFIGS, "configs")
    _check_names(values)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _check_names(names: Iterable[str], without: tuple[str, ...] = ()) -> None:
    parts = (SelectKnowledgeSettings, QuestionSplitSettings, FeatureSelectionSettings, PublishedKnowledgeSettings)
    known = {one.name for part in parts for one in fields(part)} | set(OF_MODEL)
    known -= {"questions", "selection", "published", *without}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "."
            raise ValueError(f"There is no setting {name!r}{hint}")


def _taken(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {one.name: values[one.name] for one in fields(kind) if one.name in values}
