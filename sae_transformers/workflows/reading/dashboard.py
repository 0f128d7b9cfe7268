"""One page of an SAE's features: from results of other verbs, a text and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ...create_training_data.annotation.tables import FeatureAnnotation, feature_annotations
from ...create_training_data.spans.activations import SpanOrigin, read_span_tokens
from ...create_training_data.spans.files import COLUMNS
from ...create_training_data.spans.settings import MAX_LENGTH, SpanSettings
from ...evaluation.features.histograms import ActivationHistograms
from ...evaluation.features.neighbours import decoder_neighbours
from ...evaluation.steering.samples import DIRECTION, steering_samples
from ...hub_cards.dashboard import write_dashboard
from ...hub_cards.dashboard_data import (
    OWN_ACTIVATION,
    DashboardData,
    SpanShown,
    measures_of,
    page_index,
    samples_of,
)  # fmt: skip
from ...latents.annotations.table import FeatureAnnotations
from ...latents.context import reading_length
from ...latents.text_input import text_source
from ...latents.text_latents import sae_of
from ...modeling import SaeForCausalLM, SparseAutoencoder
from ...modeling.modeling_sae import SaePreTrainedModel
from ...modeling.output_files import write_whole
from ..export.delphi import write_delphi
from ..export.known import KnownFeatures
from ..export.neuronpedia import write_neuronpedia
from ..results import Count, Progress, Result
from ..settings.dashboard import DashboardSettings, ExportSettings
from .dashboard_sources import DashboardSources, check_source, short_name
from .spans import SpansResult

ACTIVATIONS = {"relu": "the rectified pre-activation, whatever the SAE's activation is", "own": OWN_ACTIVATION}


@dataclass(frozen=True)
class DashboardResult(Result):
    """A page of features.

    Args:
        page: what it shows. features: numbers, in its order.
        samples: steered texts that were made, as rows of JSON.
        settings: how it was made.
        sae, tokenizer: with which, where there were any.
    """

    page: DashboardData = field(repr=False)
    features: list[int] = field(repr=False)
    samples: list[dict[str, Any]] = field(repr=False)
    settings: DashboardSettings
    sae: SparseAutoencoder | None = field(default=None, repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def save(self, path: str | Path, progress: Progress | None = None) -> Path:
        """Write the page, one .html file.

        Args:
            progress: called with (features done, features).
        """
        count = Count(progress, len(self.features))
        return write_dashboard(self.page, path, compress=self.settings.compress, report=count)

    def export(
        self, folder: str | Path, settings: ExportSettings | None = None, progress: Progress | None = None
    ) -> list[Path]:
        """Write what the page shows for another tool: Neuronpedia's import layout, or delphi's; the files.

        Args:
            settings: which layout and under which names; by default `self.settings.export`.
            progress: called with (features done, features).

        Raises:
            ValueError: the layout is `html`, the page was made without its SAE, the base has no name, or spans are
                not scored by the SAE's own activation.
        """
        settings = settings or self.settings.export
        writers = {"neuronpedia": write_neuronpedia, "delphi": write_delphi}
        if settings.layout not in writers:
            raise ValueError(f"`layout` must be one of {', '.join(writers)}. Received: layout={settings.layout!r}.")
        if self.sae is None:
            raise ValueError(
                "Others need the features' decoder rows: give the dashboard `sae`, or a model. Received: none."
            )
        known = KnownFeatures(self.page, self.features, self.sae, self.sae.annotations, self.tokenizer)
        return writers[settings.layout](known, folder, settings, progress)

    def save_samples(self, path: str | Path) -> None:
        """Write the samples that were made, .json."""
        write_whole(Path(path), json.dumps(self.samples, indent=1, ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """One for each feature: its number, name, explanation, label and the numbers that the page sorts by."""
        index = page_index(self.page, self.features)
        columns = {name: index[name] for name in ("feature", "name", "explanation", "label") if index[name]}
        columns |= {column["name"]: column["values"] for column in index["columns"]}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what the page lists, without the details of a feature."""
        return page_index(self.page, self.features)


def dashboard(
    sources: DashboardSources | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: DashboardSettings | None = None,
    *,
    sae: SparseAutoencoder | None = None,
    texts: Any = None,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
) -> DashboardResult:
    """The page of an SAE's features: search, sort, histograms, spans, labels, steering.

    Args:
        sources: results of other verbs.
        model, tokenizer: with SAEs, or a base with `sae`: for `texts` and for samples.
        sae: in place of one of the model's; it needs no model for names and neighbours.
        texts: read with the model: histograms of activations, and colours if it is the text of the spans. See
            `text_input.TEXTS`.
        prompts: continued with the features of `settings.samples.steer`.
        progress: called with (done, total) tokens of `texts`, then samples.

    Raises:
        ValueError: nothing is given, features that are not there, parts of different SAEs, or another text than that
            of the spans.
    """
    sources, settings = sources or DashboardSources(), settings or DashboardSettings()
    chosen, steered = settings.features, settings.samples.steer
    if not sources.given and model is None and sae is None:
        raise ValueError("Give at least `table`, `spans` or `sae`. Received: nothing to show.")
    if steered and not prompts:
        raise ValueError("`steer` needs `prompts`, what is continued. Received: none.")
    if (steered or texts is not None) and (model is None or tokenizer is None):
        raise ValueError("`texts` and `steer` need `model` and `sae`. Received: none.")
    number, one = settings.number, sae
    if one is None and isinstance(model, SaePreTrainedModel):
        one = sae_of(model, number)
    if one is not None and model is not None:
        one = one.to(model.device)
    _check_features([*(chosen or ()), *steered], sources, one)
    spans, about = _spans(sources, chosen), {}
    histograms, activation = None, ""
    if texts is not None and model is not None and one is not None:
        origin = SpanOrigin(model, tokenizer, one, text_source(texts))
        coloured, histograms, kind = _read_text(sources, settings, origin, progress)
        spans, activation = coloured or spans, ACTIVATIONS[kind] if coloured else ""
        read = f"{histograms.n_tokens:,} tokens for histograms"
        about["Text"] = f"{short_name(str(origin.source.facts['text']))}, {read}"
    made: list[dict[str, Any]] = []
    if steered and model is not None and tokenizer is not None and one is not None:
        made = _steer(model, tokenizer, sae, prompts, settings, progress)
    beside = None if one is None else one.annotations
    notes = {f: FeatureAnnotation(text) for f, text in _described(beside, chosen).items()}
    notes |= feature_annotations(sources.annotations, settings.judgement)
    called = _names(one)
    suites = [suite for record in sources.results for suite in record.suites.values()]
    shown = [*sources.samples, *made, *(row for suite in suites for row in suite.samples if "steered" in row)]
    facts = _facts(sources.facts, one, {**_known_names(sources.facts, model), **sources.names}) | about
    features = list(chosen) if chosen is not None else None
    if features is None and sources.table is None and one is not None:
        features = list(range(one.config.d_sae))
    near = {}
    if one is not None and settings.neighbours:
        near = _neighbours(one, settings.neighbours, features or range(one.config.d_sae))
    of = [facts[name] for name in ("Base model", "Place") if name in facts]
    page = DashboardData(
        settings.title or " ".join(["Features", *(["of", ", ".join(of)] if of else [])]),
        facts=facts,
        table=sources.table,
        names=_among(called, chosen),
        spans=_among(spans, chosen),
        annotations=_among({f: note for f, note in notes.items() if note.meaning or note.judgements}, chosen),
        samples=_among(samples_of(shown, sae=number), chosen),
        neighbours=near,
        raised=_among(sources.raised(number), chosen),
        measures=_measures(sources, number, called)
        | _known_numbers(beside, chosen, with_table=sources.table is not None),
        histograms=histograms,
        results=sources.merged(),
        features=features,
        activation=activation,
    )
    return DashboardResult(page, page.shown(), made, settings, one, tokenizer)


def _measures(sources: DashboardSources, number: int, called: Mapping[int, str]) -> dict[str, dict[int, float]]:
    measures: dict[str, dict[int, float]] = {}
    for record in sources.results:
        for name, column in measures_of(record, sae=number, names=called).items():
            measures.setdefault(name, {}).update(column)
    return measures


def _described(notes: FeatureAnnotations | None, chosen: Sequence[int] | None) -> dict[int, str]:
    return {} if notes is None else notes.names(notes.described.tolist() if chosen is None else chosen)


def _known_numbers(
    notes: FeatureAnnotations | None, chosen: Sequence[int] | None, *, with_table: bool
) -> dict[str, dict[int, float]]:
    """Numbers beside the descriptions, as columns; frequencies only where no table has them."""
    found: dict[str, dict[int, float]] = {}
    for name in () if notes is None else (*(() if with_table else ("frequency",)), "maximum", "output_score"):
        column = getattr(notes, name)
        if column is not None:
            numbers = range(len(column)) if chosen is None else [f for f in chosen if f < len(column)]
            found[name.replace("_", " ")] = {f: float(column[f]) for f in numbers if column[f] == column[f]}
    return found


def _among(values: Mapping[int, Any], chosen: Sequence[int] | None) -> dict[int, Any]:
    return {feature: value for feature, value in values.items() if chosen is None or feature in set(chosen)}


def _check_features(features: Sequence[int], sources: DashboardSources, sae: SparseAutoencoder | None) -> None:
    sizes = [len(sources.table)] if sources.table is not None else []
    sizes += [sae.config.d_sae] if sae is not None else []
    if len(set(sizes)) > 1:
        raise ValueError(f"`table` and `sae` must be of one SAE. Received: {sizes[0]} and {sizes[1]} features.")
    if sizes and (wrong := [number for number in features if number >= sizes[0]]):
        raise ValueError(f"The SAE has {sizes[0]} features, numbered from 0. Received: {wrong[0]}.")


def _spans(sources: DashboardSources, chosen: Sequence[int] | None) -> dict[int, list[SpanShown]]:
    """Spans without the activations of their tokens."""
    found = _among(sources.spans_by_feature(), chosen)
    return {f: [SpanShown(one.score, [one.span], text=one.text_id) for one in few] for f, few in found.items()}


def _read_text(
    sources: DashboardSources, settings: DashboardSettings, origin: SpanOrigin, progress: Progress | None
) -> tuple[dict[int, list[SpanShown]], ActivationHistograms, str]:
    """Spans with the activations of their tokens, histograms, and the activation that spans are scored by."""
    spans = sources.spans
    table: dict[str, Any] = {name: torch.zeros(0, dtype=torch.long) for name in COLUMNS} | {"span": []}
    if isinstance(spans, SpansResult):
        span_settings = spans.settings
        check_source(spans.index["source"], origin.source.facts)
        rows = torch.arange(len(spans.feature))
        if settings.features is not None:
            rows = torch.isin(spans.feature, torch.tensor(settings.features)).nonzero()[:, 0]
        table = {name: getattr(spans, name)[rows] for name in COLUMNS}
        table["span"] = [spans.span[i] for i in rows.tolist()]
    else:
        span_settings = SpanSettings(max_length=reading_length(origin.model, settings.max_length, MAX_LENGTH))
    histograms = ActivationHistograms(origin.sae.config.d_sae)
    found = read_span_tokens(
        replace(origin, settings=span_settings), table,
        after=settings.after, max_tokens=settings.max_tokens, visit=histograms.add,
        report=Count(progress, settings.max_tokens),
    )  # fmt: skip
    shown: dict[int, list[SpanShown]] = {}
    for feature, score, one in zip(table["feature"].tolist(), table["score"].tolist(), found, strict=True):
        shown.setdefault(feature, []).append(SpanShown(score, one.tokens, one.activations, one.peak, one.text))
    return shown, histograms, span_settings.activation


def _steer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SparseAutoencoder | None,
    prompts: Sequence[str],
    settings: DashboardSettings,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    wanted = settings.samples
    count = Count(progress, len(prompts) * (1 + len(wanted.steer) * len(wanted.strengths)))
    steered: Any = model
    edit = replace(DIRECTION, sae=settings.number)
    if sae is not None:
        steered = SaeForCausalLM.from_base(getattr(model, "lm", model), saes=[sae]).eval()
        edit = DIRECTION
    return steering_samples(
        steered, tokenizer, prompts, wanted.steer, wanted.strengths, wanted.generation,
        edit=edit, report=count,
    )  # fmt: skip


def _neighbours(sae: SparseAutoencoder, k: int, features: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
    near = decoder_neighbours(sae.W_dec, min(k, sae.config.d_sae - 1), features)
    pairs = zip(features, near.latents.tolist(), near.cosines.tolist(), strict=True)
    return {feature: list(zip(latents, cosines, strict=True)) for feature, latents, cosines in pairs}


def _names(sae: SparseAutoencoder | None) -> dict[int, str]:
    if sae is None:
        return {}
    config = sae.config
    names = {int(number): str(name) for number, name in config.feature_names.items() if str(number).isdecimal()}
    return {**names, **{latent: name for name, latent in config.concepts.items()}}


def _known_names(table: Mapping[str, Any], model: PreTrainedModel | None) -> dict[str, str]:
    config: Any = None if model is None else model.config
    own = getattr(config, "base_model_name_or_path", None) or getattr(config, "name_or_path", None)
    return {"Base model": str(table.get("model") or own or ""), "SAE": str(table.get("sae") or "")}


def _facts(table: Mapping[str, Any], sae: SparseAutoencoder | None, names: Mapping[str, str]) -> dict[str, str]:
    shown = {name: short_name(value) for name, value in names.items() if value}
    if place := table.get("place") or (sae is not None and sae.config.placed and sae.config.read_at):
        shown["Place"] = str(place)
    if sae is not None:
        shown["Activation"] = sae.config.activation + (f", k = {sae.config.k}" if sae.config.k else "")
    if table.get("text"):
        shown["Frequencies"] = f"{short_name(str(table['text']))}, {table['text_tokens']:,} tokens"
    return shown
