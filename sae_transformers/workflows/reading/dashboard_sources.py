"""What a dashboard is made of: the results of other verbs, in memory or from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...create_training_data.annotation.tables import AnnotationRow, read_annotations
from ...create_training_data.spans.files import Spans, TextSpan, read_spans
from ...evaluation.features.table import FeatureTable
from ...evaluation.features.table_files import read_feature_table
from ...evaluation.results import Results, read_results
from ...hub_cards.dashboard_data import Raised
from ...latents.texts import TextSource, open_text
from ...modeling.plain_files import read_json
from .attribution_result import AttributionResult
from .spans import SpansResult, read_spans_result

RAISED_SHOWN = 20  # texts of a feature


@dataclass(frozen=True)
class DashboardSources:
    """What is known of an SAE's features; each part adds something to the page.

    Args:
        table: of `feature_table`, or read by `read_feature_table`.
        spans: of `spans`; or feature -> its spans, which then have no colours.
        annotations: rows of `explain` or `judge`.
        results: of `evaluate`; a later one's suites replace those of the same name.
        samples: steered texts: rows of feature, strength, prompt, text, perplexity; see `samples_of`.
        attributions: of `attribute`, or their `to_dict()`: what each feature raises.
        names: what the page calls `Base model` and `SAE`; by default as the table says, and the model's own name.
    """

    table: FeatureTable | None = None
    spans: SpansResult | Mapping[int, Sequence[TextSpan]] | None = None
    annotations: Sequence[AnnotationRow] = ()
    results: Sequence[Results] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    attributions: Sequence[AttributionResult | Mapping[str, Any]] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether there is any part."""
        parts = self.annotations, self.results, self.samples, self.attributions
        return self.table is not None or self.spans is not None or any(map(len, parts))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the table says of model, SAE and text."""
        return {} if self.table is None else self.table.facts

    def spans_by_feature(self) -> Mapping[int, Sequence[TextSpan]]:
        """The spans of each feature that has some, best first."""
        return self.spans.by_feature() if isinstance(self.spans, Spans) else self.spans or {}

    def raised(self, sae: int) -> dict[int, list[Raised]]:
        """What each feature of an SAE did in the texts of `attributions`, the largest effects first.

        Raises:
            ValueError: one is no result of `attribute`.
        """
        found: dict[int, list[Raised]] = {}
        for one in self.attributions:
            values = one.to_dict() if isinstance(one, AttributionResult) else one
            try:
                for feature, row in _effects(values, sae).items():
                    found.setdefault(feature, []).append(row)
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"Expected what `attribute` found, as its `to_dict()` or its .json. Received: {sorted(values)}, "
                    f"{type(error).__name__}: {error}."
                ) from error
        return {f: sorted(rows, key=lambda row: -abs(row.effect))[:RAISED_SHOWN] for f, rows in found.items()}

    def merged(self) -> Results | None:
        """The results as one record."""
        merged = self.results[0] if self.results else None
        for record in self.results[1:]:
            for suite in record.suites.values():
                merged = merged and merged.with_suite(suite)
        return merged


def read_sources(
    *,
    table: Path | None = None,
    spans: str | None = None,
    with_texts: bool = False,
    annotations: Path | None = None,
    results: Sequence[Path] = (),
    samples: Path | None = None,
    attributions: Sequence[Path] = (),
) -> DashboardSources:
    """The files of other verbs.

    Args:
        table: folder or table that `feature_table` wrote.
        spans: folder that `spans` wrote.
        with_texts: the text of the spans will be read again, so the folder must say what it is of.
        annotations: table that `explain` or `judge` wrote.
        results: results.json of `evaluate`.
        samples: steered texts, .json or .jsonl.
        attributions: .json of `attribute`.

    Raises:
        ValueError: a file is not what it should be.
        OSError: one is not there.
    """
    found = None
    if spans is not None:
        found = read_spans_result(spans) if with_texts else read_spans(spans)
    return DashboardSources(
        None if table is None else read_feature_table(table),
        found,
        () if annotations is None else read_annotations(annotations),
        [read_results(path) for path in results],
        () if samples is None else _read_samples(samples),
        [read_json(path) for path in attributions],
    )


def _effects(values: Mapping[str, Any], sae: int) -> dict[int, Raised]:
    """Of one text: feature -> its effects summed, and where the largest one is."""
    sums: dict[int, float] = {}
    strongest: dict[int, tuple[float, int]] = {}
    for pair in values["pairs"]:
        if pair["sae"] == sae:
            feature, effect = int(pair["feature"]), float(pair["effect"])
            sums[feature] = sums.get(feature, 0.0) + effect
            strongest[feature] = max(strongest.get(feature, (0.0, 0)), (abs(effect), int(pair["position"])))
    text, tokens = "".join(values["tokens"]), values["tokens"]
    return {f: Raised(str(values["target"]), total, tokens[strongest[f][1]], text) for f, total in sums.items()}


def open_text_of_spans(
    text: str, sources: DashboardSources, text_column: str | None = None, txt_rows: str | None = None
) -> TextSource:
    """The text that spans were collected on, as it was read then; or any, where there are none.

    Args:
        text: as `open_text` takes it.
        text_column, txt_rows: in place of what the spans say.
    """
    known = sources.spans.index["source"] if isinstance(sources.spans, SpansResult) else {}
    source = open_text(
        text,
        column=text_column or known.get("column", "text"),
        txt_rows=txt_rows or known.get("txt_rows", "paragraph"),
        split=known.get("split", "train"),
        subset=known.get("subset"),
    )
    return source.first(known["max_rows"]) if known.get("max_rows") else source


def check_source(known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: rows are not those that spans were collected on.
    """
    different = [key for key in known if key != "text" and known[key] != now.get(key)]
    if different:
        told = "; ".join(f"{key} was {known[key]!r} and is {now.get(key)!r}" for key in different)
        raise ValueError(f"`texts` must be the text that `spans` was collected on. Received: {told}.")


def short_name(name: str) -> str:
    """A Hub id unchanged; of a path its last component, since others have no use for the rest."""
    return name if not Path(name).is_absolute() and Path(name).parts[:1] != ("..",) else Path(name).name


def _read_samples(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"Expected JSON in `samples`. Received: {str(path)!r}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"`samples` must hold a list of objects. Received: {str(path)!r} with something else.")
    return rows
