"""Find features that go with gender, take them out in growing number, and measure bias and what it costs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...create_training_data.harvest.store import Store
from ...create_training_data.swaps import both_versions, read_word_pairs
from ...evaluation.fairness.data import BiasData, LastWordPart, PairPart
from ...evaluation.fairness.data import read_bias_data as read_bias_data
from ...evaluation.journal import Journal, Watch
from ...evaluation.plots import plot_curves
from ...latents.context import reading_length
from ...latents.hidden_states import HiddenStateReader
from ...latents.output_files import writes_to
from ...latents.progress import Keep
from ...latents.sparse_codes import encode_texts
from ...latents.text_input import text_source, tokenized
from ...latents.text_latents import sae_of
from ...latents.text_states import usual_states
from ...latents.texts import open_text as open_text
from ...latents.texts import read_column as read_column
from ...modeling import Steering
from ...modeling.modeling_sae import SaePreTrainedModel
from ...training.steering.bias_reduction import GENDERED_PAIRS, Ranking, rank_by_swaps, rank_by_tokens, reducing, sweep
from ..going_on import forgotten_if_refused, verb_journal, went_on
from ..results import Count, Progress, Result, save_json
from ..settings.reduce_bias import BiasSettings

Part = PairPart | LastWordPart


@dataclass(frozen=True)
class BiasRun:
    """What was measured with some features taken out.

    Args:
        features: how many.
        kind: how they were found, or which random draw they are of.
        measures: of each part, by its name, as results.json has them.
    """

    features: int
    kind: str
    measures: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.features} {self.kind}"


@dataclass(frozen=True)
class BiasResult(Result):
    """Steering that takes out the features that go with gender, and what was measured with each number of them.

    Args:
        steering: with `chosen` features taken out.
        chosen: the number with the smallest gaps on the pairs that choose, within the loss that is allowed.
        features, scores: the features that go with gender, the strongest first, as many as were taken out at most.
        qualified: how many there are.
        random_features: those of each random draw.
        runs: a measurement for each number of features.
        parts: what was measured on.
        texts, tokens, cut: texts with gendered words that were read, their tokens, and how many texts were cut.
        seconds: of all.
        settings: how it was made.
        journal: keeps what was measured until the result is saved.
    """

    steering: Steering = field(repr=False)
    chosen: int
    features: list[int]
    scores: list[float] = field(repr=False)
    qualified: int
    random_features: list[list[int]] = field(repr=False)
    runs: list[BiasRun] = field(repr=False)
    parts: list[Part] = field(repr=False)
    texts: int
    tokens: int
    cut: int
    seconds: float
    settings: BiasSettings = field(repr=False)
    journal: Journal | None = field(repr=False, default=None)

    def summary(self) -> list[str]:
        """What was read and chosen, in a few lines."""
        lines = [*went_on(self.journal), f"{self.texts:,} rows with gendered words, {self.tokens:,} tokens"]
        if self.cut:
            lines.append(f"{self.cut:,} rows were cut at {self.settings.reading.max_length} tokens (max_length)")
        return [*lines, f"{self.qualified:,} features qualify, {self.chosen} chosen"]

    def table(self) -> list[dict[str, str]]:
        """Of each run the mean gap in nats (0: no preference) and the share of pairs whose stereotypical text is
        likelier, on the parts that report, and how many last words are right and their perplexity."""
        rows = []
        for run in self.runs:
            row = {"features": run.name}
            for part in self.parts:
                measures = run.measures[part.name]
                if part.chooses:
                    continue
                if isinstance(part, LastWordPart):
                    accuracy, perplexity = measures["accuracy"]["value"], measures["perplexity"]["value"]
                    row[f"{part.name}: right, perplexity"] = f"{accuracy:.1%} {perplexity:.2f}"
                else:
                    gap, share = (measures["sentence"][name]["value"] for name in ("gap", "share"))
                    row[part.name] = f"{gap:+.3f} {share:.1%}"
            rows.append(row)
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """One for each run, part and measure: value and interval."""
        return [
            {"features": run.features, "kind": run.kind, "part": part, "measure": name, **value}
            for run in self.runs
            for part, measures in run.measures.items()
            for name, value in _flat(measures)
        ]

    def to_dict(self, facts: dict[str, Any] | None = None) -> dict[str, Any]:
        """results.json.

        Args:
            facts: what else it says of the run, such as the names of model and SAE.
        """
        known = {
            "complete": True, "find": self.settings.find, "op": self.settings.op, "chosen": self.chosen,
            "features": self.features, "scores": self.scores, "random_features": self.random_features,
            "seconds": self.seconds,
        }  # fmt: skip
        return {"facts": {**known, **(facts or {})}, "runs": {run.name: run.measures for run in self.runs}}

    def plot(self, path: str | Path) -> Path | None:
        """The gap on each part that reports over the number of features taken out; None without matplotlib."""
        panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
        for part in self.parts:
            if part.chooses or isinstance(part, LastWordPart):
                continue
            curves = panels.setdefault(part.name, {})
            for run in self.runs:
                gap = run.measures[part.name]["sentence"]["gap"]
                curves.setdefault(run.kind, []).append((run.features, gap["value"], gap["low"], gap["high"]))
        return plot_curves(panels, path, "features taken out", "mean gap, nats")

    def save(self, folder: str | Path, facts: dict[str, Any] | None = None) -> list[Path]:
        """Write results.json and steering.json.

        Returns:
            The files.
        """
        files = save_json(folder, {"results.json": self.to_dict(facts), "steering.json": self.steering.to_dict()})
        if self.journal is not None:
            self.journal.remove()
        return files


@writes_to("out")
def reduce_bias(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    data: BiasData | str | Path,
    settings: BiasSettings | None = None,
    *,
    sae: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> BiasResult:
    """Steering that takes out what an SAE knows of gender, with what that does to stereotypes and to the language.

    Args:
        texts: with gendered words, to find features on; see `text_input.TEXTS`.
        data: what to measure on, as `read_bias_data` gives it; a path is the folder of WinoBias.
        sae: number of the SAE.
        out: folder whose results.json has what is known after each measurement, and whose bias.partial.jsonl lets the
            same call go on where a run was stopped; `save` writes the whole, and ends that. A URL has results alone.
        progress: called with (measurements done, measurements).

    Raises:
        ValueError: no row with gendered words, no feature that goes with them, or settings that do not fit.
        TypeError: `texts` holds no texts.
        OSError: a file of `data` is not there.
    """
    start = time.perf_counter()
    settings = settings or BiasSettings()
    sae_of(model, sae)
    length = reading_length(model, settings.reading.max_length, 64)
    settings = replace(settings, reading=replace(settings.reading, max_length=length))
    data = data if isinstance(data, BiasData) else read_bias_data(data)
    parts = data.parts(settings.max_pairs, settings.max_choose, settings.max_lambada)
    path = None if out is None or "://" in str(out) else Path(out) / "bias.partial.jsonl"
    journal = verb_journal(path, model.lm, sae_of(model, sae), settings, sae, len(model.saes))
    with forgotten_if_refused(journal):
        found = _find(model, tokenizer, texts, settings, sae, Watch(journal=journal).keep)
        ranked, activity = found.ranked, found.activity
        counts = sorted({0, *(n for n in settings.counts if n <= len(ranked.features))})
        live = (activity > 0).nonzero()[:, 0]
        random_counts = [n for n in sorted(set(settings.random_counts or settings.counts)) if 0 < n <= len(live)]
        total = len(counts) + settings.random_seeds * len(random_counts)
        store = None if out is None else Store(out)
        measure = _Measure(model, tokenizer, parts, settings, store, journal, progress, total)
        values = activity[ranked.features]
        measure.kind = settings.find
        sweep(ranked.features, counts, measure, op=settings.op, values=values, sae=sae)
        chosen = _choose(measure.runs, parts, settings.max_loss)
        generator, drawn = torch.Generator().manual_seed(settings.bootstrap.seed), []
        for number in range(settings.random_seeds):
            some = live[torch.randperm(len(live), generator=generator)]
            drawn.append(some[: max(counts)].tolist())
            measure.kind = f"random, draw {number + 1}"
            sweep(some, random_counts, measure, op=settings.op, values=activity[some], sae=sae)
        kept = ranked.features[: max(counts)]
        return BiasResult(
            steering=reducing(ranked.features[:chosen], op=settings.op, value=values[:chosen].tolist(), sae=sae),
            chosen=chosen,
            features=kept.tolist(),
            scores=ranked.scores[kept].tolist(),
            qualified=len(ranked.features),
            random_features=drawn,
            runs=measure.runs,
            parts=parts,
            texts=found.rows,
            tokens=found.tokens,
            cut=found.cut,
            seconds=time.perf_counter() - start,
            settings=settings,
            journal=journal,
        )


class _Found(NamedTuple):
    """ranked: features that go with gender. activity: (d_sae,), mean activation of each latent on the texts."""

    ranked: Ranking
    activity: Tensor
    rows: int
    tokens: int
    cut: int


def _find(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    settings: BiasSettings,
    number: int,
    keep: Keep,
) -> _Found:
    pairs, reading = read_word_pairs(settings.words or GENDERED_PAIRS), settings.reading
    length = reading.max_length or 0
    rows: list[tuple[str, str]] = []
    for _, block in text_source(texts).blocks(256, itertools.count()):
        rows += zip(*both_versions([text.strip() for text in block.texts], pairs), strict=True)
        if len(rows) >= 4 * settings.max_texts:
            break
    versions = [[row[side] for row in rows] for side in (0, 1)]
    sides = [tokenized(tokenizer, version, max_length=length).ids if rows else [] for version in versions]
    used = [
        i for i, (male, female) in enumerate(zip(*sides, strict=True))
        if min(len(male), len(female)) > reading.skip_first and male != female
    ][: settings.max_texts]  # fmt: skip
    if not used:
        raise ValueError(f"The text needs rows with gendered words among their first {length} tokens. Received: none.")
    ids = [[side[i] for i in used] for side in sides]

    def rank() -> dict[str, Tensor]:
        ranked, activity, tokens = _rank(model, tokenizer, ids, settings, number)
        return {**ranked._asdict(), "activity": activity, "tokens": torch.tensor(tokens)}

    found = keep({"ranked": ids}, rank)
    cut = tokenized(tokenizer, [versions[0][i] for i in used], max_length=length).cut
    ranked = Ranking(found["features"], found["scores"])
    return _Found(ranked, found["activity"], len(used), int(found["tokens"]), cut)


def _rank(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sides: Sequence[Sequence[Sequence[int]]],
    settings: BiasSettings,
    number: int,
) -> tuple[Ranking, Tensor, int]:
    """Features that go with gender, mean activation of each latent (d_sae,), and how many tokens there are.

    Args:
        sides: token ids of rows with male words, and of the same with female ones.
    """
    pairs, reading = read_word_pairs(settings.words or GENDERED_PAIRS), settings.reading
    sae = sae_of(model, number)
    reader = HiddenStateReader(model.lm, [sae.config.read_at], config=model.config)
    read = [
        _states(reader, [torch.tensor(row) for row in rows], reading.skip_first, reading.tokens_per_batch)
        for rows in sides
    ]
    states, of_row, kept = zip(*read, strict=True)
    both = torch.cat(states)
    activity = encode_texts(sae, both).sums() / len(both)
    if settings.find == "swaps":
        ranked = rank_by_swaps(sae, states[0], states[1], (of_row[0], of_row[1]))
    else:
        male, female = (frozenset(pair[side] for pair in pairs) for side in (0, 1))
        words = [word.strip().lower() for word in tokenizer.batch_decode(torch.cat(kept)[:, None])]
        is_male, is_female = (torch.tensor([word in known for word in words]) for known in (male, female))
        gendered = is_male | is_female
        if settings.find == "tokens":
            ranked = rank_by_tokens(sae, both, gendered.long())
        else:
            ranked = rank_by_tokens(sae, both[gendered], is_female[gendered].long())
    return ranked, activity, len(states[0])


def _states(
    reader: HiddenStateReader, ids: list[Tensor], skip_first: int, tokens_at_once: int
) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, d_in) of all tokens but the first of each row and those ten times as long as the median, the row of
    each (n,) and its id (n,)."""
    keep = [torch.arange(skip_first, len(row)) for row in ids]
    (states,) = reader.read(ids, keep, dtype=torch.float32, tokens_at_once=tokens_at_once).values()
    rows = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(places) for places in keep]))
    usual = usual_states(states, rows, len(ids))
    return states[usual], rows[usual], torch.cat([row[skip_first:] for row in ids])[usual]


class _Measure:
    """What a `Steering` does to each part. The first one that it is called with is what the others are compared to."""

    def __init__(
        self,
        model: SaePreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        parts: list[Part],
        settings: BiasSettings,
        store: Store | None,
        journal: Journal | None,
        progress: Progress | None,
        total: int,
    ) -> None:
        self.model, self.tokenizer, self.parts, self.settings = model, tokenizer, parts, settings
        self.store, self.journal, self.count = store, journal, Count(progress, total)
        self.kind, self.runs = "", list[BiasRun]()
        self.unsteered: list[Any] | None = None

    def __call__(self, steering: Steering) -> None:
        tokens = self.settings.reading.tokens_per_batch
        given = (self.model, self.tokenizer, steering or False, tokens, self.journal)
        scores: list[Any] = [part.score(*given) for part in self.parts]
        self.unsteered = self.unsteered or scores
        measures = {
            part.name: part.summary(after, before, self.settings.bootstrap)
            for part, after, before in zip(self.parts, scores, self.unsteered, strict=True)
        }
        self.runs.append(BiasRun(len(steering.edits), self.kind, measures))
        if self.store is not None:
            runs = {run.name: run.measures for run in self.runs}
            self.store.write_json("results.json", {"facts": {"complete": False}, "runs": runs})
        self.count(1)


def _choose(runs: list[BiasRun], parts: list[Part], max_loss: float) -> int:
    """The number of features with the smallest gaps on the pairs that choose, within the loss that is allowed."""
    choosing = [part for part in parts if part.chooses]
    texts = [part.name for part in choosing if isinstance(part, LastWordPart)]
    pairs = [part.name for part in choosing if isinstance(part, PairPart)]
    allowed = [
        run
        for run in runs
        if run.features == 0 or all(run.measures[name]["lost"]["value"] <= max_loss for name in texts)
    ]

    def gaps(run: BiasRun) -> float:
        return sum(abs(run.measures[name]["sentence"]["gap"]["value"]) for name in pairs)

    return min(allowed, key=lambda run: (gaps(run), run.features)).features


def _flat(measures: dict[str, Any], before: str = "") -> list[tuple[str, dict[str, float]]]:
    """`sentence.gap` and so on, each with its value and interval."""
    if "value" in measures:
        return [(before, measures)]
    return [pair for name, value in measures.items() for pair in _flat(value, f"{before}.{name}" if before else name)]
