"""Make a model answer from its context, or from what it remembers, where the two differ (SpARE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...create_training_data.grouped_prompts import GroupedPrompt, grouped_rows, read_grouped_prompts
from ...create_training_data.harvest.blocks import weights_digest
from ...create_training_data.harvest.store import Store
from ...create_training_data.knowledge_conflict import ConflictQuestion, question_groups, read_conflicts, split_pool
from ...evaluation.classification import summary
from ...evaluation.plots import plot_methods
from ...latents.output_files import writes_to
from ...modeling import SaeForCausalLM, Steering
from ...training.steering.functional_features import FunctionalFeatures
from ..results import Count, Progress, Result, save_json
from ..settings.select_knowledge import (
    PublishedKnowledgeSettings,
    QuestionSplitSettings,
    SelectKnowledgeSettings,
    check_side,
)
from .functional import save_steered_model, save_steerings, with_activation
from .knowledge.answers import AskedModel
from .knowledge.choice import ChosenSettings, choose_settings, edit_settings, knowledge_steering
from .knowledge.comparison import compare_methods, needs_states, prompts_per_question
from .knowledge.learning import VARIANTS, LearntFeatures, ask_pool, learn_features, take_published
from .knowledge.published import published_for
from .knowledge.published import select_published_knowledge as select_published_knowledge

SHOWN = ("em_context", "em_memory", "neither", "em_context_to_memory", "em_memory_to_context", "prefers_memory")


@dataclass(frozen=True)
class SelectKnowledgeResult(Result):
    """The steering towards both sides, and what it does beside other methods.

    Args:
        steering: `context` and `memory`, or the one of them that was asked for -> the steering towards it.
        methods: method -> its metrics, one mapping for each choice of demonstrations; see `knowledge_metrics`.
        chosen: the setting of each side, and all that were tried on the dev questions.
        learnt: what was learnt from the pool.
        questions: how many there are, and how many of them have contexts that are short enough.
        facts: what was run, as `results.json` has it.
        model: with the SAEs that `steering` is for. tokenizer: of it.
        settings: how it was done.
        asked_questions: all that were given; prompts number them.
    """

    steering: dict[str, Steering] = field(repr=False)
    methods: dict[str, list[dict[str, float]]]
    chosen: ChosenSettings = field(repr=False)
    learnt: LearntFeatures = field(repr=False)
    questions: tuple[int, int]
    facts: dict[str, Any] = field(repr=False)
    model: SaeForCausalLM = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    settings: SelectKnowledgeSettings = field(repr=False)
    asked_questions: Sequence[ConflictQuestion] = field(repr=False)

    @property
    def features(self) -> list[FunctionalFeatures]:
        """What each latent of each SAE has to do with both behaviours."""
        return self.learnt.features

    def summary(self) -> list[str]:
        """What was learnt and chosen, in a few lines."""
        return [
            *_question_lines(self.questions, self.settings.questions),
            *_learnt_lines(self.learnt, self.settings.published),
            *_chosen_lines(self.chosen, self.steering, self.settings.selection.max_broken),
        ]

    def table(self) -> list[dict[str, str]]:
        """One row for each method: its metrics as mean ± half of the 95 % interval over the choices of
        demonstrations; a dash where a metric is not defined."""
        return [{"method": method, **_intervals(metrics)} for method, metrics in self.methods.items()]

    def rows(self) -> list[dict[str, Any]]:
        """One for each method and choice of demonstrations: method, seed, metrics."""
        return [
            {"method": method, "seed": seed, **metrics}
            for method, measured in self.methods.items()
            for seed, metrics in zip(self.facts["seeds"], measured, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `results.json` has it: metrics, settings that were tried and chosen, facts."""
        chosen = {side: setting._asdict() for side, setting in self.chosen.settings.items()}
        return {"methods": self.methods, "tried": self.chosen.tried, "chosen": chosen, "facts": self.facts}

    def plot(self, path: str | Path) -> Path | None:
        """Answers from the context against answers from memory, a point for each method; None without matplotlib."""
        return plot_methods(self.methods, path, x="em_memory", y="em_context")

    def save(self, folder: str | Path, *, model: str | None = None) -> None:
        """Write `towards-SIDE.json` of each side, `features-N.safetensors` of each SAE, `results.json`, and in
        `grouped_prompts/` the prompts that were learnt from, in SpARE's columns.

        Args:
            folder: made where it is not there.
            model: `context` or `memory`: also write `model/`, a model that is steered so by default.

        Raises:
            ValueError: no such side.
        """
        check_side(model, self.settings.sides, "model")
        save_steerings(folder, self.features, self.steering, self.to_dict())
        split = self.settings.questions
        if self.learnt.grouped and self.settings.published.grouped is None:
            name = f"{split.shots}shot-seed{split.split_seed}-results.json"
            rows = grouped_rows(self.learnt.grouped, self.asked_questions)
            save_json(Path(folder) / "grouped_prompts", {name: rows})
        if model is not None:
            save_steered_model(Path(folder) / "model", self.model, self.tokenizer, self.steering[model])


@writes_to("out")
def select_knowledge(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Any,
    settings: SelectKnowledgeSettings | None = None,
    *,
    out: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> SelectKnowledgeResult:
    """Learn from a pool of questions, choose on others, and measure on yet others, beside baselines.

    Args:
        model: with an SAE, or several at different layers.
        questions: rows of question, org_context, org_answer, sub_context, sub_answer, as NQ-Swap has: the name of a
            file or a Hub data set, a `Dataset`, a DataFrame, mappings, or what `read_conflicts` gives.
        out: folder to which the results are written after each choice of demonstrations. What the model answered is
            kept in its `work/`: a run that was stopped goes on.
        facts: noted in `results.json`, such as the names of model and SAEs.
        progress: called with (prompts done, prompts in all).
        notice: called with each line of the result's `summary()` as soon as it is known.

    Raises:
        ValueError: too few questions, a behaviour that the model does not show, or an SAE that is not there.
    """
    settings = settings or SelectKnowledgeSettings()
    split, activation = settings.questions, settings.selection.activation
    known = read_conflicts(questions)
    fitting = [
        row for row, one in enumerate(known) if max(len(one.org_context), len(one.sub_context)) <= split.max_context
    ]
    counts = len(known), len(fitting)
    given = settings.published.grouped
    grouped = None if given is None else read_grouped_prompts(given, known)
    shown, pool, parts = divide_questions(known, fitting, split, grouped)
    _tell(notice, _question_lines(counts, split))
    model = with_activation(model, activation)
    published = published_for(model, settings)
    tried = edit_settings(settings.selection, len(model.saes))
    learns = published is None or any(one.values is None for one in published) or needs_states(settings.baselines)
    asked = AskedModel(
        model,
        tokenizer,
        weights_digest(model) + (activation if activation != "own" else ""),
        known,
        shown,
        settings,
        None if out is None else Store(Path(out) / "work"),
        Count(progress, _expected_prompts(settings, len(pool) if learns and grouped is None else 0, len(tried))),
    )
    if published is not None and not learns:
        learnt = take_published(published)
    else:
        learnt = learn_features(asked, ask_pool(asked, pool) if grouped is None else grouped, published)
    _tell(notice, _learnt_lines(learnt, settings.published))
    chosen = choose_settings(asked, learnt.features, parts["dev"], tried)
    legacy = settings.selection.legacy
    steering = {
        side: knowledge_steering(learnt.features, side, setting, legacy=legacy)
        for side, setting in chosen.settings.items()
    }
    _tell(notice, _chosen_lines(chosen, steering, settings.selection.max_broken))
    described = {"answered": learnt.answered, "learnt from": learnt.learnt_from, **(facts or {})}
    described |= {"test": len(parts["test"]), "max_context": split.max_context}
    first = SelectKnowledgeResult(steering, {}, chosen, learnt, counts, described, model, tokenizer, settings, known)
    *_, result = _measured(asked, parts["test"], first, out)
    return result


def _tell(notice: Callable[[str], object] | None, lines: Sequence[str]) -> None:
    if notice is not None:
        for line in lines:
            notice(line)


def divide_questions(
    questions: Sequence[ConflictQuestion],
    fitting: Sequence[int],
    split: QuestionSplitSettings,
    grouped: Sequence[GroupedPrompt] | None = None,
) -> tuple[list[int], list[int], dict[str, list[int]]]:
    """Rows to take demonstrations from, rows to learn from, and rows of `dev` and `test`, one of each question; no
    question is in two of them, but for demonstrations of published prompts, which are learnt from too.

    Args:
        fitting: rows whose contexts are short enough.
        grouped: published prompts: their questions are the pool.

    Raises:
        ValueError: too few questions.
    """
    here = [questions[row] for row in fitting]
    if grouped is None:
        pool, rest = split_pool(here, n_groups=split.pool, seed=split.split_seed)
        firsts = list({here[row].question: fitting[row] for row in reversed(pool)}.values())[::-1]
        shown, pool = firsts[: VARIANTS * split.shots], firsts[VARIANTS * split.shots :]
    else:
        pool = list(dict.fromkeys(one.row for one in grouped))
        short, asked = set(fitting), {questions[row].question for row in pool}
        shown = [row for row in dict.fromkeys(row for one in grouped for row in one.shown) if row in short]
        asked |= {questions[row].question for row in shown}
        rest = [row for row, one in enumerate(here) if one.question not in asked]
    outside = set(rest)
    others = [rows[0] for rows in question_groups(here) if rows[0] in outside]
    order = np.random.RandomState(split.split_seed).permutation(len(others))
    if len(others) < split.dev + split.test:
        raise ValueError(
            f"Outside the pool there are {len(others)} questions. Received: dev={split.dev!r}, test={split.test!r}."
        )
    chosen = [fitting[others[i]] for i in order]
    return shown, pool, {"dev": chosen[: split.dev], "test": chosen[split.dev : split.dev + split.test]}


def _measured(
    asked: AskedModel, rows: Sequence[int], result: SelectKnowledgeResult, out: str | Path | None
) -> Iterator[SelectKnowledgeResult]:
    """The result after each choice of demonstrations; what is measured is not lost with a later one."""
    seeds = asked.settings.questions.seeds
    methods: dict[str, list[dict[str, float]]] = {}
    for number, seed in enumerate(seeds, 1):
        for method, metrics in compare_methods(asked, rows, seed, result.steering, result.learnt).items():
            methods.setdefault(method, []).append(metrics)
        result = replace(result, methods=methods, facts={**result.facts, "seeds": list(seeds[:number])})
        if out is not None:
            result.save(out)
        yield result


def _expected_prompts(settings: SelectKnowledgeSettings, n_pool: int, n_tried: int) -> int:
    split, sides = settings.questions, len(settings.sides)
    choosing = split.dev * (1 + 2 * sides * n_tried) if n_tried > 1 else 0
    measuring = len(split.seeds) * split.test * prompts_per_question(settings.baselines, sides)
    return 3 * n_pool + choosing + measuring


def _question_lines(counts: tuple[int, int], split: QuestionSplitSettings) -> list[str]:
    return [f"{counts[0]:,} questions, {counts[1]:,} with contexts of at most {split.max_context} characters"]


def _learnt_lines(learnt: LearntFeatures, published: PublishedKnowledgeSettings) -> list[str]:
    lines = [f"features are those of {published.features}"] if published.features is not None else []
    if not learnt.grouped:
        return lines
    lines += [f"of {learnt.prompts:,} prompts the model answers {_counts(learnt.answered)}"]
    if learnt.by_likelihood:
        lines.append(f"grouped by the answer that is likelier instead: {_counts(learnt.learnt_from)}")
    return lines


def _chosen_lines(chosen: ChosenSettings, steering: Mapping[str, Steering], max_broken: float) -> list[str]:
    lines = []
    for side, setting in chosen.settings.items():
        if side in chosen.broken:
            lines.append(
                f"to {side}: every setting leaves more dev questions without either answer than max_broken "
                f"({max_broken:g}) allows; the one that leaves the fewest is taken"
            )
        lines.append(
            f"to {side}: proportion {setting.proportion:g}, strength {setting.degree:g}, SAEs "
            f"{', '.join(map(str, setting.saes))}; {len(steering[side].edits)} edits"
        )
    return lines


def _counts(groups: Mapping[str, int]) -> str:
    return " and ".join(f"{count:,} from {side}" for side, count in groups.items())


def _intervals(measured: Sequence[Mapping[str, float]]) -> dict[str, str]:
    cells = {}
    means = summary(measured)
    for name in SHOWN:
        found = means[name]
        half = f" ± {found.high - found.mean:.3f}" if found.n > 1 else ""
        cells[name.replace("_", " ")] = f"{found.mean:.3f}{half}" if found.n else "-"
    return cells
