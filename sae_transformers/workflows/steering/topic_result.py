"""What `align_topic` gives: steering, scores, how far to trust them, and what each method wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...evaluation.journal import Journal
from ...evaluation.plots import plot_methods
from ...evaluation.topics.alignment import TopicUncertainty
from ...evaluation.topics.generation import UNSTEERED, MethodRow
from ...modeling import Steering
from ...training.steering.topic_scores import TopicScores, write_topic_scores
from ..going_on import went_on
from ..results import Result, save_json, to_frame
from ..settings.align_topic import TopicSettings

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class TopicResult(Result):
    """Steering towards a topic, and what is known of it.

    Args:
        steering: of `settings.scoring.method`; for `generate`, or as the model's default.
        scores: of each latent.
        latents: further columns of the table of scores: in how many reference texts a latent is active, its share in
            the topic's texts, and what kind it is.
        uncertainty: see `topic_alignment`.
        threshold: above which uncertainty the warning stands; None where there are too few reference texts.
        mean_distance: of the reference texts to the topic.
        methods: measures of each method; empty where nothing was generated.
        samples: each prompt with its continuations.
        texts, tokens, left_out, cut: of `reference` and `topic`: texts and tokens that count, texts without a token
            that counts, and texts that were cut.
        seconds: until there were scores.
        embedder, embedding_tokens: what measured distances, and its limit.
        settings: how it was made.
        error_threshold: above which reconstruction error the warning stands too; None where `threshold` is.
        unused_prompts: prompts beyond `prompt_count`, which were not continued.
        journal: keeps what was measured until the result is saved.
    """

    steering: Steering = field(repr=False)
    scores: TopicScores = field(repr=False)
    latents: Mapping[str, Sequence[Any]] = field(repr=False)
    uncertainty: TopicUncertainty
    threshold: float | None
    mean_distance: float
    methods: dict[str, MethodRow] = field(repr=False)
    samples: list[dict[str, str]] = field(repr=False)
    texts: dict[str, int]
    tokens: dict[str, int]
    left_out: dict[str, int]
    cut: dict[str, int]
    seconds: float
    embedder: str
    embedding_tokens: int | None
    settings: TopicSettings = field(repr=False)
    error_threshold: float | None = None
    unused_prompts: int = 0
    journal: Journal | None = field(repr=False, default=None)

    @property
    def warning(self) -> bool | None:
        """Whether the SAE and these texts represent the topic badly; None where that cannot be told."""
        return None if self.threshold is None else bool(self._exceeded())

    def _exceeded(self) -> list[str]:
        """What is above its threshold, as sentences."""
        found, quantile = self.uncertainty, f"{self.settings.embedding.quantile:.0%}"
        told = []
        if self.threshold is not None and found["uncertainty"] > self.threshold:
            told.append(
                f"uncertainty {found['uncertainty']:.3f} is above the threshold of {self.threshold:.3f}, below which "
                f"{quantile} of topics made of reference texts lie"
            )
        if self.error_threshold is not None and found["reconstruction_error"] > self.error_threshold:
            told.append(
                f"reconstruction error {found['reconstruction_error']:.3f} is above {self.error_threshold:.3f}, below "
                f"which {quantile} of the usual reference texts lie"
            )
        return told

    def summary(self) -> list[str]:
        """How far to trust it, in a few lines."""
        reading = self.settings.reading
        short = "a single token" if reading.skip_first < 2 else f"{reading.skip_first} tokens or fewer"
        lines = went_on(self.journal)
        lines += [f"{n} {part} text(s) of {short} are left out" for part, n in self.left_out.items() if n]
        lines += [
            f"{n} {part} text(s) were cut at {reading.max_length} tokens (max_length)"
            for part, n in self.cut.items()
            if n
        ]
        if self.unused_prompts:
            given = self.unused_prompts + len(self.samples)
            lines.append(f"{len(self.samples)} of {given} prompts were continued (prompt_count)")
        lines.append(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.uncertainty.items()))
        if self.threshold is None:
            count = self.texts["reference"]
            return [*lines, f"{count} reference texts are too few for a threshold: no warning can be given"]
        if told := self._exceeded():
            return [*lines, f"Warning: {'; '.join(told)}: the SAE and these texts represent the topic badly"]
        limits = f"thresholds of {self.threshold:.3f}"
        limits += "" if self.error_threshold is None else f" and {self.error_threshold:.3f}"
        return [*lines, f"uncertainty and reconstruction error are not above their {limits}"]

    def rows(self) -> list[dict[str, Any]]:
        """The measures of each method: its name and what `MethodRow` says."""
        return [{"method": name, **row} for name, row in self.methods.items()]

    def table(self) -> list[dict[str, str]]:
        """The most telling of these, as texts; means ± standard errors."""
        judged = "SLOR" if self.settings.measuring.acceptability is None else "P(acceptable)"
        return [
            {
                "method": name,
                "similarity": f"{row['similarity']:.3f}",
                "change": f"{row['similarity_change']:+.3f} ± {row['similarity_change_error']:.3f}",
                "perplexity": f"{row['perplexity']:.1f}",
                judged: f"{row['acceptability']:.2f}",
                "repeated": f"{row['repetition']:.1%}",
            }
            for name, row in self.methods.items()
        ]

    def continuations(self) -> list[dict[str, str]]:
        """Each prompt with its continuation unsteered and by the method whose steering is the result."""
        shown = dict.fromkeys(("prompt", UNSTEERED, self.settings.scoring.method))
        return [{name: sample[name] for name in shown} for sample in self.samples]

    def to_frame(self) -> DataFrame:
        """A row for each latent, as in scores.csv, as a pandas DataFrame."""
        costs = self.scores.costs.tolist()
        columns = {"score": self.scores.scores.tolist(), "cost": costs, **self.latents}
        return to_frame(
            [
                {"feature": number, **{name: values[number] for name, values in columns.items()}}
                for number in range(len(costs))
            ]
        )

    def to_dict(self, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """report.json.

        Args:
            facts: what else it says of the run, such as the names of files.
        """
        return {
            "facts": {
                **_facts(self.settings),
                **(facts or {}),
                "embedder": self.embedder,
                "embedding_tokens": self.embedding_tokens,
            },
            "texts": self.texts,
            "tokens": self.tokens,
            "mean_distance": self.mean_distance,
            "uncertainty": self.uncertainty,
            "threshold": self.threshold,
            "error_threshold": self.error_threshold,
            "warning": self.warning,
            "seconds_of_scores": self.seconds,
            "methods": self.methods,
            "prompts": [sample["prompt"] for sample in self.samples],
        }

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> list[Path]:
        """Write scores.csv, scores.parquet, steering.json, report.json, and samples.json where there are some.

        Returns:
            The files.
        """
        out = Path(folder)
        tables = [
            write_topic_scores(out / f"scores.{end}", self.scores, dict(self.latents)) for end in ("csv", "parquet")
        ]
        values: dict[str, Any] = {"steering.json": self.steering.to_dict(), "report.json": self.to_dict(facts)}
        if self.methods:
            values["samples.json"] = self.samples
        files = [*tables, *save_json(out, values)]
        if self.journal is not None:
            self.journal.remove()
        return files

    def plot(self, path: str | Path) -> Path | None:
        """A point for each method: its perplexity against the similarity that it adds.

        Returns:
            The path; None without matplotlib.

        Raises:
            ValueError: nothing was generated.
        """
        if not self.methods:
            raise ValueError("Nothing was generated to plot. Received: prompt_count=0.")
        rows: dict[str, Any] = {name: [row] for name, row in self.methods.items()}
        return plot_methods(rows, path, x="perplexity", y="similarity_change")


def _facts(settings: TopicSettings) -> dict[str, Any]:
    """Settings as report.json has always named them."""
    measuring, reading = dataclasses.asdict(settings.measuring), settings.reading
    generation = measuring.pop("generation")
    return {
        **dataclasses.asdict(settings.scoring),
        "compare": ",".join(settings.scoring.compare),
        "long_texts": settings.embedding.long_texts,
        "quantile": settings.embedding.quantile,
        **measuring,
        "new_tokens": generation["max_new_tokens"],
        **{name: generation[name] for name in ("top_k", "temperature", "top_p", "seed")},
        "max_length": reading.max_length,
        "skip_first": reading.skip_first,
        "tokens_at_once": reading.tokens_per_batch,
    }
