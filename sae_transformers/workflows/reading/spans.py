"""Max-activating examples: the stretches of text on which each latent of an SAE is strongest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from ...create_training_data.harvest.store import Store, rank_and_world
from ...create_training_data.spans.activations import read_span_index
from ...create_training_data.spans.collect import SpanCollector, read_maxima, write_spans
from ...create_training_data.spans.files import COLUMNS, Spans, read_table
from ...latents.output_files import shared_folder
from ...latents.text_input import text_source
from ...latents.text_latents import sae_of
from ...modeling import SparseAutoencoder
from ..results import Progress, Result
from ..settings.spans import SpanSettings


@dataclass(frozen=True, eq=False)
class SpansResult(Spans, Result):
    """The strongest spans of every latent; the fields of `Spans`, and how they were found.

    Args:
        settings: how they were found.
        index: what identifies them, as the folder says it: model, SAE, text and settings.
        measured: the SAE, with its `feature_max`; None where the spans were read from a folder.
    """

    settings: SpanSettings = field(default_factory=SpanSettings)
    index: Mapping[str, Any] = field(default_factory=dict, repr=False)
    measured: SparseAutoencoder | None = field(default=None, repr=False)

    @property
    def sae(self) -> SparseAutoencoder:
        """The SAE, with its `feature_max`.

        Raises:
            ValueError: the spans were read from a folder, which does not hold it.
        """
        if self.measured is None:
            raise ValueError("Spans that were read from a folder come without their SAE. Received: measured=None.")
        return self.measured

    def rows(self) -> list[dict[str, Any]]:
        """One for each span, by latent and then best first: feature, score, text_id, position, start, end, span."""
        columns = [getattr(self, name).tolist() for name in COLUMNS]
        named = (*COLUMNS, "span")
        return [dict(zip(named, row, strict=True)) for row in zip(*columns, self.span, strict=True)]

    def counts(self) -> dict[str, int]:
        """How many texts, tokens, spans, latents with spans, and latents there are."""
        found = {"texts": self.n_texts, "tokens": self.n_tokens, "spans": len(self.span)}
        return {**found, "latents with spans": len(self.feature.unique()), "latents": self.d_sae}

    def to_dict(self) -> dict[str, Any]:
        """As JSON: counts and settings, without the spans."""
        return {**self.counts(), "complete": self.complete, "settings": self.settings.identity()}

    def summary(self) -> list[str]:
        """What was found, in a line."""
        if not self.complete:
            return [f"process {rank_and_world()[0]}: its part is done; others are still at work"]
        return [", ".join(f"{count:,} {name}" for name, count in self.counts().items())]

    def save(self, folder: str | Path) -> None:
        """Write the tables and their index, as `spans(..., out=folder)` does.

        Raises:
            ValueError: other processes are still at work.
        """
        if not self.complete:
            raise ValueError("Other processes are still at work. Received: complete=False.")
        write_spans(self, Store(folder), self.index)

    def table(self) -> list[dict[str, Any]]:
        """Feature, score and text of each span."""
        return [{name: row[name] for name in ("feature", "score", "span")} for row in self.rows()]


def spans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    settings: SpanSettings | None = None,
    *,
    sae: int | SparseAutoencoder = 0,
    out: str | Path | None = None,
    text_column: str = "text",
    progress: Progress | None = None,
) -> SpansResult:
    """The strongest spans of every latent, each from another text; and the unit `max` of steering.

    The SAE's `feature_max` is filled with the largest activation of each latent on the tokens that are read:
    `sae.save_pretrained(folder)` or `model.save_pretrained(folder)` keeps it.

    Args:
        model: with SAEs; or a base, with `sae`.
        texts: a list, a `Dataset`, a DataFrame, a path, or what `open_text` gives: see `text_input.TEXTS`.
        sae: number of one of the model's, or an SAE itself.
        out: a folder or any fsspec URL. The same call goes on where an earlier one was stopped; several processes
            share it.
        text_column: column of the text, where rows have columns.
        progress: called with (rows done, rows), 0 where their number is not known.

    Raises:
        ValueError: the SAE is not made for the width of its place, the folder has spans of something else, or the text
            has changed since.
        TypeError: `texts` holds no texts.
        BlockingIOError: another process of the same rank writes to `out`.
    """
    source = text_source(texts, text_column=text_column)
    if isinstance(sae, SparseAutoencoder):
        sae = sae.to(model.device)
    else:
        sae_of(model, sae)  # is there
    collector = SpanCollector(model, tokenizer, sae, source, settings, out=out)
    work = None if out is None else f"{str(out).rstrip('/')}/work"
    with shared_folder(out, *rank_and_world()), shared_folder(work, *rank_and_world()):
        found = collector.run(progress=progress if collector.rank == 0 else None)
    if found.feature_max is not None and found.n_tokens:
        collector.sae.feature_max.copy_(found.feature_max)
    return SpansResult(**vars(found), settings=collector.settings, index=collector.index(), measured=collector.sae)


def read_spans_result(folder: str | Path) -> SpansResult:
    """What `spans` wrote to a folder.

    Raises:
        FileNotFoundError: the folder does not say what its spans are of, or has none yet.
    """
    index = read_span_index(str(folder))
    url = str(folder).rstrip("/")
    counts = Store(url).read_json("spans.json")
    if counts is None:
        raise FileNotFoundError(f"Expected the result of `spans`, spans.json. Received: {url!r}, which has none yet.")
    return SpansResult(
        **read_table(f"{url}/spans.parquet"), **counts, feature_max=read_maxima(Store(f"{url}/work")),
        settings=SpanSettings.from_identity(index["settings"]), index=index,
    )  # fmt: skip
