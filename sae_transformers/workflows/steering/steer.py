"""Find features by labelled texts, choose operation and strength by generating, and save the steered model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...create_training_data.concept_sets import read_concept_sets
from ...create_training_data.concept_writing import rate_answers
from ...evaluation.generation.continuations import chat_prompts, prompt_ids
from ...evaluation.journal import Journal, quick_fingerprint
from ...evaluation.results import versions
from ...evaluation.scorers.registry import Scorer, get_scorer
from ...evaluation.steering.plot import plot_steering
from ...latents.context import reading_length
from ...latents.splits import label_halves
from ...latents.text_input import TokenizedTexts, tokenized
from ...latents.text_latents import encode_text_means
from ...modeling import SaeForCausalLM, Steering
from ...training.steering.calibration import Calibration, SteeringPoint, calibrate, ladders_of, split_prompts
from ...training.steering.effect_scores import outcome_correlations
from ...training.steering.feature_search import FeatureSearch, best_of, search_features
from ...training.steering.settings import ATTRIBUTION, OUTCOME
from ...training.steering.text_attributions import text_attributions
from ..results import Count, Progress, Result, save_json
from ..settings.steer import SteerSettings

REPORT_SHARE = 0.5  # of the prompts
NAMES = {"vader": "sentiment", "toxicity": "profanity"}  # of scorers, as `get_scorer` has them


@dataclass(frozen=True)
class SteerResult(Result):
    """What a search found.

    Args:
        calibration: the chosen steering, all that were tried, and what the other prompts report.
        searches: of each SAE its candidates, best first.
        concept: what was searched for, in words.
        texts, prompts: how many there were.
        missing: texts of the half that searches which are too short to be read.
        cut: texts that were cut.
        resumed: parts of the continuations that a stopped run had made.
        warnings: what a user should know.
        settings: how it was done.
        steered: the model that was given, and its tokenizer.
        journal: keeps the continuations until the result is saved.
    """

    calibration: Calibration
    searches: tuple[FeatureSearch, ...] = field(repr=False)
    concept: str
    texts: int
    prompts: int
    missing: int
    cut: int
    resumed: int
    warnings: tuple[str, ...]
    settings: SteerSettings = field(repr=False)
    steered: tuple[SaeForCausalLM, PreTrainedTokenizerBase] = field(repr=False)
    journal: Journal | None = field(repr=False, default=None)

    @property
    def steering(self) -> Steering:
        """The chosen one; empty where nothing within the budget scored above the unsteered model."""
        return self.calibration.steering

    @property
    def curve(self) -> tuple[SteeringPoint, ...]:
        """Every steering that was tried, on the prompts that chose."""
        return self.calibration.curve

    @property
    def report(self) -> tuple[SteeringPoint, SteeringPoint] | None:
        """Without and with the chosen steering, on the other prompts: the numbers to quote."""
        return self.calibration.report

    @property
    def candidates(self) -> list[dict[str, float]]:
        """The features that were tried: SAE, feature, statistic, output score."""
        return [row for search in self.searches for row in search.rows()[: self.settings.search.top]]

    def model(self) -> SaeForCausalLM:
        """The model that was given, with the chosen steering as its default; as it was where none was chosen."""
        model, _ = self.steered
        if self.steering:
            model.steering = self.steering
            if model.generation_config is not None:
                model.generation_config.sae_steering = None  # of a model that had a default of its own
        return model

    def rows(self) -> list[dict[str, Any]]:
        """No steering and every one that was tried, with score, perplexity and repetition."""
        chosen = self.steering
        return [
            _row(point, chosen=bool(point.steering) and point.steering == chosen, within_budget=point.within_budget)
            for point in (self.calibration.unsteered, *self.curve)
        ]

    def table(self) -> list[dict[str, Any]]:
        """Prompts that report, and then those that choose."""
        return self.report_rows() + self.rows()

    def report_rows(self) -> list[dict[str, Any]]:
        """The same of the prompts that report, without and with the chosen steering."""
        return [_row(point) for point in self.report or ()]

    def summary(self) -> list[str]:
        """What a user should know before the numbers."""
        lines = [f"Warning: {warning}" for warning in self.warnings]
        if self.missing:
            skipped = self.settings.reading.skip_first
            lines.append(f"{self.missing:,} texts have no token after the first {skipped}, and were not searched.")
        if self.resumed and self.journal is not None:
            lines.append(f"Went on after {self.resumed} parts of {self.journal.path}.")
        if self.cut:
            lines.append(f"{self.cut:,} texts were cut.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which is what report.json holds."""
        search, scoring = self.settings.search, self.settings.scoring
        return {
            **self.calibration.to_dict(),
            "candidates": self.candidates,
            "concept": self.concept,
            "texts": self.texts,
            "prompts": self.prompts,
            "statistic": search.statistic,
            "selection": search.selection,
            "lower": self.settings.strength.lower,
            "scorer": scoring.scorer,
            "seed": self.settings.generation.seed,
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write steering.json (a `Steering`), report.json and, where a steering was chosen, model/; the paths."""
        target = Path(folder)
        paths = save_json(target, {"steering.json": self.steering.to_dict(), "report.json": self.to_dict()})
        if self.steering:
            paths.append(target / "model")
            self.model().save_pretrained(target / "model")
            self.steered[1].save_pretrained(target / "model")
        if self.journal is not None:
            self.journal.remove()
        return paths

    def plot(self, path: str | Path) -> Path | None:
        """Score against perplexity, a line a feature and operation; None without matplotlib."""
        rows = []
        for point in (self.calibration.unsteered, *self.curve):
            edits = point.steering.feature_edits
            method = f"SAE {edits[0].sae} feature {edits[0].feature} {edits[0].op}" if edits else "none"
            value = edits[0].value if edits else None
            rows.append({
                "method": method, "setting": "ablate" if value is None else f"{value:g}",
                "perplexity": point.perplexity, "concept_score": point.score, "within_budget": point.within_budget,
                "chosen_to": ["chosen"] if edits and point.steering == self.steering else [],
            })  # fmt: skip
        return plot_steering(rows, path, title=self.concept)


def steer(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    labels: Sequence[int],
    prompts: Sequence[str],
    settings: SteerSettings | None = None,
    *,
    scorer: Scorer | None = None,
    progress: Progress | None = None,
) -> SteerResult:
    """Find features by labelled texts, and choose operation and strength by what they do to generated text.

    One half of the texts ranks the features, the other half teaches the scorer `words`. One half of the prompts
    chooses, the other half reports. A selection by correlation reads what the model writes after the prompts that
    choose. No text is in both: a prompt that is there twice is on one side, and a prompt that reports may not be one
    of the texts.

    Args:
        texts: see `text_input.TEXTS`.
        labels: of each text, 1 where the concept is, 0 where it is not.
        prompts: what is continued.
        scorer: continuations -> a number each, higher for more of what is wanted, in place of `settings.scoring`.
        progress: called with the continuations that features are correlated with, if any, then with the texts that
            are read, and then with the continuations that are done.

    Raises:
        ValueError: labels that do not fit, too few texts of a label, prompts that do not fit, a prompt that reports
            and is among the texts, or a bad score.
        ServiceRefused: a judge's server takes no more requests; what was answered is kept.
    """
    settings = settings or SteerSettings()
    generation, search, strength = settings.generation, settings.search, settings.strength
    max_length = reading_length(model, settings.reading.max_length, 256)
    found = tokenized(tokenizer, texts, max_length=max_length)
    if len(labels) != len(found.texts):
        raise ValueError(f"Expected a label for each of {len(found.texts)} texts. Received: {len(labels)} labels.")
    asked = chat_prompts(tokenizer, prompts) if generation.chat else list(prompts)
    prompt_ids(model, tokenizer, asked, generation.max_new_tokens)  # prompts that are too long are refused now
    choosing, reporting = split_prompts(asked, REPORT_SHARE, generation.seed)
    plain = dict(zip(asked, prompts, strict=True))
    if both := len({plain[prompt] for prompt in reporting} & set(found.texts)):
        raise ValueError(
            f"Prompts that report must not be among the labelled texts, which search: leave them out. Received: "
            f"{both} of {len(reporting)} that are."
        )
    by_op = strength.by_op()
    ladders_of([(0, 0)], strength.ops, strengths=by_op)
    searching, fitting = label_halves(labels, generation.seed)
    score = scorer or _scorer(settings, [found.texts[i] for i in fitting], [labels[i] for i in fitting])
    kept = [i for i in searching if len(found.ids[i]) > settings.reading.skip_first]
    journal = None if settings.journal is None else Journal(settings.journal, _about(model))
    resumed = 0 if journal is None else journal.found
    correlations = [None] * len(model.saes)
    if search.selection in OUTCOME:
        correlations = _correlations(model, tokenizer, choosing, score, settings, progress, journal)
    searches = _searches(model, tokenizer, found, [(i, labels[i]) for i in kept], settings, progress, correlations)
    ladders = ladders_of(best_of(searches, search.top), strength.ops, strengths=by_op, lower=strength.lower)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        calibration = calibrate(
            model, tokenizer, asked, score, ladders, generation, settings.budget, report_share=REPORT_SHARE,
            progress=progress, journal=journal,
        )  # fmt: skip
    return SteerResult(
        calibration, tuple(searches), settings.scoring.judge_concept or "", len(found.texts), len(prompts),
        len(searching) - len(kept), found.cut, resumed, tuple(str(one.message) for one in caught), settings,
        (model, tokenizer), journal,
    )  # fmt: skip


def read_labelled(
    source: str, text_column: str = "text", label_column: str = "label", concept: int = 0
) -> tuple[list[str], list[int], str]:
    """Texts, their labels and the concept's name, from a table, or from a folder of `concept_set`.

    Args:
        concept: its number in a folder of several.

    Raises:
        ValueError: there is no such concept or column, or a label is unknown.
        OSError: there is no such file.
    """
    sets = read_concept_sets(source, text_column=text_column, label_column=label_column)
    if not 0 <= concept < len(sets):
        raise ValueError(f"`concept` must be in [0, {len(sets)}). Received: {concept}.")
    examples, labels = sets[concept].labelled()
    return [example.text for example in examples], labels, sets[concept].concept


def _searches(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: TokenizedTexts,
    labelled: Sequence[tuple[int, int]],
    settings: SteerSettings,
    progress: Progress | None,
    correlations: Sequence[Tensor | None],
) -> list[FeatureSearch]:
    """The candidates of each SAE by some of the texts, each given by its number and label."""
    reading = settings.reading
    ids, labels = [texts.ids[i] for i, _ in labelled], torch.tensor([label for _, label in labelled])
    if len(labels.unique()) < 2:
        raise ValueError(
            f"Texts of both labels are needed that have more than {reading.skip_first} tokens. Received: {len(ids)} "
            f"texts so long in the half that searches."
        )
    if settings.search.selection == ATTRIBUTION:
        told = [number for number, row in enumerate(ids) if len(row) > 1]
        correlations = text_attributions(
            model, [ids[number] for number in told], labels[told], skip_first=reading.skip_first,
            tokens_at_once=max(1, reading.tokens_per_batch // 4), report=Count(progress, len(told)),
        )  # fmt: skip
    means = encode_text_means(
        model, ids, skip_first=reading.skip_first, tokens_at_once=reading.tokens_per_batch,
        report=Count(progress, len(labelled)),
    )  # fmt: skip
    return [
        search_features(
            of_sae.codes, labels, model, tokenizer, settings.search, sae=number, correlations=correlations[number]
        )
        for number, of_sae in enumerate(means)
    ]


def _correlations(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    score: Scorer,
    settings: SteerSettings,
    progress: Progress | None,
    journal: Journal | None,
) -> list[Tensor]:
    """Of each SAE (d_sae,), with how much of the concept is in what the model writes after some prompts."""
    samples = settings.search.outcome_samples if settings.generation.temperature > 0 else 1
    generation = replace(settings.generation, samples_per_prompt=samples)
    found = outcome_correlations(
        model, tokenizer, prompts, score, generation, report=Count(progress, samples * len(prompts)), journal=journal
    )
    return [-one for one in found] if settings.strength.lower else found  # where less is wanted, more scores less


def _about(model: SaeForCausalLM) -> Any:
    """What the continuations under different steerings depend on: the model and nothing else."""
    saes = [config.to_dict() for config in model.config.sae_configs]
    facts = [quick_fingerprint(model), model.lm.config.to_dict(), saes, str(model.lm.dtype)]
    return json.loads(json.dumps([*facts, dict(versions())], default=str))


def _scorer(settings: SteerSettings, texts: Sequence[str], labels: Sequence[int]) -> Scorer:
    """Texts -> scores, higher for what is wanted."""
    sign, kind = -1.0 if settings.strength.lower else 1.0, settings.scoring.scorer
    if kind != "judge":
        present, absent = ([t for t, label in zip(texts, labels, strict=True) if label == value] for value in (1, 0))
        scorer = get_scorer(NAMES.get(kind, kind), labelled=(present, absent), seed=settings.generation.seed)
        return lambda found: sign * torch.as_tensor(scorer(found), dtype=torch.float64)
    wanted = settings.scoring.judge_concept
    if wanted is None:
        raise ValueError("A judge needs `judge_concept`, what it looks for in words. Received: judge_concept=None.")
    client = settings.llm.client()

    def judged(found: Sequence[str]) -> list[float]:
        return [sign * one for one in rate_answers(client, wanted, found, found, kinds=["concept"])["concept"]]

    return judged


def _row(point: SteeringPoint, **more: bool) -> dict[str, Any]:
    edits = [
        f"SAE {e.sae} feature {e.feature} {e.op}" + ("" if e.value is None else f" {e.value:g}")
        for e in point.steering.feature_edits
    ]
    numbers = {"score": point.score, "score_error": point.score_error, "perplexity": point.perplexity}
    return {"steering": ", ".join(edits) or "none", **numbers, "repetition": point.repetition, **more}
