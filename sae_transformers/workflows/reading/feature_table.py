"""What each feature writes: statistics of its logit weights, top and bottom tokens, frequency, contexts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ...create_training_data.annotation.questions import annotation_rows
from ...create_training_data.annotation.tables import write_annotations
from ...create_training_data.spans.files import TextSpan
from ...create_training_data.spans.files import read_spans as read_spans
from ...evaluation.features.coherence import KINDS, letters, read_vectors, token_coherence, word_coherence
from ...evaluation.features.table import FeatureTable, count_firing, firing_frequency
from ...evaluation.features.table import feature_table as table_of_weights
from ...evaluation.features.table_files import table_columns, write_feature_table
from ...evaluation.features.table_view import COLUMNS, head_and_tail, original_columns
from ...evaluation.journal import Journal, Watch
from ...latents.context import reading_length
from ...latents.hidden_states import HiddenStateReader
from ...latents.progress import Keep
from ...latents.text_input import text_source, tokenized
from ...latents.text_latents import sae_of as sae_of
from ...latents.texts import TextSource
from ...modeling import SparseAutoencoder
from ...modeling.conversion.saelens import published_sparsity
from ..going_on import forgotten_if_refused, verb_journal, went_on
from ..results import Count, Progress, html_table, to_frame
from ..settings.feature_table import FeatureTableSettings

if TYPE_CHECKING:
    from pandas import DataFrame

QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


@dataclass(frozen=True)
class FeatureTableResult:
    """A table of all features of an SAE.

    Args:
        table: its columns; `table.facts` says what was done.
        seconds: that the statistics of the weights took.
        cut: rows of the text that were cut.
        missing: rows of the text without a token that counts.
        settings: what was asked for.
        unread: why the sparsity that was published with the SAE is not in the table; empty otherwise.
        journal: keeps what was measured until the result is saved.
    """

    table: FeatureTable
    seconds: float
    cut: int = 0
    missing: int = 0
    settings: FeatureTableSettings = field(default_factory=FeatureTableSettings)
    unread: str = ""
    journal: Journal | None = None

    def __repr__(self) -> str:
        return self.text()

    def text(self, rows: int = 5, width: int = 80) -> str:
        """The table itself in the original's columns, its first rows and its last, no wider than `width` columns."""
        return head_and_tail(self.table, rows, width)

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> list[Path]:
        """Write features.parquet, .csv and .json, facts.json, and words.tsv for `explain` and `ask_features`.

        Args:
            facts: what else facts.json says, such as `{"sae": "my-sae"}`.
        """
        table = replace(self.table, facts={**self.table.facts, **(facts or {})})
        files = write_feature_table(table, folder)
        rows = annotation_rows(table.top_tokens, table.contexts)
        files.append(write_annotations(rows, Path(folder) / "words.tsv", ("FeatureID", "Words")))
        if self.journal is not None:
            self.journal.remove()
        return files

    def statistics(self) -> list[dict[str, Any]]:
        """A row for each number: how it is distributed over the features."""
        table = self.table
        columns: dict[str, Tensor | None] = {
            name: getattr(table.weights, name) for name in ("mean", "std", "skewness", "kurtosis")
        }
        columns |= {
            "published_sparsity": table.published_sparsity,
            "log10_frequency": table.log10_frequency,
            "coherence": table.coherence,
        }
        rows = []
        for name, values in columns.items():
            known = values[~values.isnan()] if values is not None else torch.empty(0)
            if len(known):
                found = known.quantile(known.new_tensor(list(QUANTILES.values()))).tolist()
                rows.append({"": name, **dict(zip(QUANTILES, found, strict=True))})
        return rows

    def summary(self) -> list[str]:
        """What was counted."""
        table, lines = self.table, went_on(self.journal)
        if self.unread:
            lines.append(f"The sparsity that was published with the SAE was not read: {self.unread}")
        if table.dead is not None:
            tokens = table.facts["text_tokens"]
            lines.append(f"{int(table.dead.sum()):,} features fired on none of {tokens:,} tokens")
        if self.missing:
            lines.append(f"{self.missing:,} rows of the text have no token that counts.")
        if self.cut:
            lines.append(f"{self.cut:,} rows of the text were cut.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what was done, without the features."""
        return {**self.table.facts, "features": len(self.table), "cut": self.cut, "missing": self.missing}

    def to_frame(self) -> DataFrame:
        """The table, a row for each feature, as a pandas DataFrame: the original's columns, then all others."""
        columns = {**original_columns(self.table), **table_columns(self.table)}
        return to_frame([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    def _repr_html_(self) -> str:
        columns = original_columns(self.table)
        return html_table([dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def feature_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: FeatureTableSettings | None = None,
    *,
    sae: int | SparseAutoencoder = 0,
    texts: Any = None,
    spans: str | Path | Mapping[int, Sequence[TextSpan]] | None = None,
    text_column: str = "text",
    progress: Progress | None = None,
) -> FeatureTableResult:
    """The table of a whole SAE, from its weights; with texts, how often each feature fires.

    Sparsity that was published beside the weights, as SAELens' releases do, is read where the SAE was read.

    With texts the SAE's `feature_max` is filled too, the unit `max` of steering: `sae.save_pretrained(folder)` or
    `model.save_pretrained(folder)` keeps it.

    Args:
        model: with SAEs; or a base, with `sae`.
        sae: number of one of the model's, or an SAE itself.
        texts: on which firing is counted: see `text_input.TEXTS`.
        spans: folder that `spans` wrote, or what `read_spans` gives: max-activating examples that join the table.
        text_column: column of the text, where rows have columns.
        progress: called with the features that are done, and then with the tokens that are read.

    Raises:
        ValueError: the SAE does not write into this model's residual stream, spans are of another one, or no token
            matches.
        FileNotFoundError: there are no spans.
    """
    settings = settings or FeatureTableSettings()
    one = (sae if isinstance(sae, SparseAutoencoder) else sae_of(model, sae)).to(model.device)
    examples = read_spans(spans) if isinstance(spans, (str, Path)) else spans
    if examples and max(examples) >= one.config.d_sae:
        raise ValueError(
            f"`spans` must be of this SAE, of {one.config.d_sae:,} features. Received: feature {max(examples)}."
        )
    source = None if texts is None else text_source(texts, text_column=text_column)
    max_length = reading_length(model, settings.reading.max_length, 256)
    start, base = time.perf_counter(), getattr(model, "lm", model)
    journal = verb_journal(settings.journal, base, one, settings, tokenizer.get_vocab(), without=["feature_max"])
    with forgotten_if_refused(journal):
        table = table_of_weights(
            model, tokenizer, one, top_k=settings.top_k, fold_norm=settings.fold_norm, centre=settings.centre,
            match=settings.match, watch=Watch(Count(progress, one.config.d_sae), journal),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        facts = {**table.facts, "model": base.name_or_path, "seconds": seconds, "coherence": settings.coherence}
        table, read = replace(table, coherence=_coherence(model, table, settings.coherence)), None
        published, unread = None, ""
        try:
            published = published_sparsity(one.config)
        except (OSError, ValueError) as error:
            unread = str(error)
        if published is not None:
            table = replace(table, published_sparsity=published.values)
            facts["published_sparsity"] = published.source
        if source is not None:
            chosen = replace(settings, reading=replace(settings.reading, max_length=max_length))
            read = _read_firing(model, tokenizer, one, source, chosen, progress, Watch(journal=journal).keep)
            if read.tokens:
                one.feature_max.copy_(read.maxima)
            frequency, dead = firing_frequency(read.counts, read.tokens)
            table = replace(table, log10_frequency=frequency, dead=dead)
            facts |= {"text": source.facts.get("text"), "text_tokens": read.tokens}
        if examples is not None:
            best = [examples.get(i, [])[: settings.contexts] for i in range(len(table))]
            table = replace(
                table,
                contexts=[[one.span for one in row] for row in best],
                context_scores=[[one.score for one in row] for row in best],
            )
            facts["spans"] = str(spans) if isinstance(spans, (str, Path)) else None
        cut, missing = (0, 0) if read is None else (read.cut, read.missing)
        return FeatureTableResult(replace(table, facts=facts), seconds, cut, missing, settings, unread, journal)


def _coherence(model: PreTrainedModel, table: FeatureTable, kind: str) -> Tensor | None:
    weights = table.weights
    if kind in KINDS:
        return token_coherence(model, weights.top_ids, weights.top_weights, embedding=kind)
    if kind == "none":
        return None
    wanted = sorted({letters(token) for row in table.top_tokens for token in row})
    return word_coherence(table.top_tokens, weights.top_weights, read_vectors(kind, wanted))


class _Firing(NamedTuple):
    """counts, maxima, tokens: as of `count_firing`. cut, missing: rows that were cut, and without a token that
    counts."""

    counts: Tensor
    maxima: Tensor
    tokens: int
    cut: int
    missing: int


def _read_firing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SparseAutoencoder,
    source: TextSource,
    settings: FeatureTableSettings,
    progress: Progress | None,
    keep: Keep,
) -> _Firing:
    """How often latents fire on the hidden states of a text, block by block, without first tokens."""
    reading = settings.reading
    reader = HiddenStateReader(getattr(model, "lm", model), [sae.config.read_at], config=model.config)
    left, cut, missing = settings.max_tokens, 0, 0
    counts, maxima = torch.zeros(sae.config.d_sae, dtype=torch.long), torch.zeros_like(sae.feature_max)
    for _, rows in source.blocks(128, itertools.count()):
        texts = [text for text in rows.texts if text.strip()]
        missing += len(rows.texts) - len(texts)
        if not texts:
            continue
        found = tokenized(tokenizer, texts, max_length=reading.max_length or 256)
        kept = _kept(found.ids, reading.skip_first, left)
        cut += found.cut
        missing += sum(len(row) <= reading.skip_first for row in found.ids)
        if any(len(places) for places in kept):

            def fire(ids: Sequence[Sequence[int]] = found.ids, kept: list[Tensor] = kept) -> dict[str, Tensor]:
                rows = [torch.tensor(row) for row in ids]
                states = reader.read(rows, kept, tokens_at_once=reading.tokens_per_batch)[sae.config.read_at]
                firing = count_firing(sae, [states])
                return {"counts": firing.counts.int(), "maxima": firing.maxima}

            fired = keep({"firing": found.ids, "kept": [places.tolist() for places in kept]}, fire)
            counts += fired["counts"]
            maxima = torch.maximum(maxima, fired["maxima"].to(maxima))
            left -= sum(map(len, kept))
            if progress is not None:
                progress(settings.max_tokens - left, settings.max_tokens)
        if left <= 0:
            break
    return _Firing(counts, maxima, settings.max_tokens - left, cut, missing)


def _kept(ids: Sequence[Sequence[int]], skip_first: int, left: int) -> list[Tensor]:
    """Positions of each row that count, no more than `left` in all."""
    kept = []
    for row in ids:
        places = torch.arange(min(skip_first, len(row)), len(row))[: max(0, left)]
        left -= len(places)
        kept.append(places)
    return kept
