"""Score texts by one feature, and say how well the score tells labelled texts apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...evaluation.detection.metrics import auroc
from ...evaluation.plots import plot_histograms
from ...latents.context import reading_length
from ...latents.text_input import tokenized
from ...latents.text_latents import batches_of
from ...latents.texts import LABEL_NAMES, column_of, open_text
from ...modeling.modeling_sae import SaePreTrainedModel
from ...training.steering.feature_search import held_out_f1
from ..results import Count, Progress, Result, html_table, save_csv, to_frame
from ..settings.detect import DetectSettings

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class DetectResult(Result):
    """The scores of n texts by one feature.

    Args:
        feature: number of the latent. sae: number of its SAE.
        texts: as they were given.
        scores: (n,) float32; NaN where a text has no token that counts.
        labels: 0, 1 or None of each text; None where none were given.
        cut: how many texts were cut.
        settings: how they were scored.
    """

    feature: int
    sae: int
    texts: list[str] = field(repr=False)
    scores: Tensor = field(repr=False)
    labels: list[int | None] | None = field(repr=False)
    cut: int
    settings: DetectSettings

    @property
    def missing(self) -> int:
        """How many texts have no score."""
        return int(torch.isnan(self.scores).sum())

    def quality(self) -> dict[str, float]:
        """`auroc`; `f1` at `threshold`, which one half of the texts sets and the other half is measured with; and
        `f1_always_yes`, F1 on that half of calling every text positive. Empty without labels of both kinds."""
        known = [
            i for i, label in enumerate(self.labels or ()) if label is not None and self.scores[i] == self.scores[i]
        ]
        truth = torch.tensor([(self.labels or ())[i] for i in known])
        if not known or len(truth.unique()) < 2:
            return {}
        scores = self.scores[known]
        f1 = held_out_f1(scores, truth, seed=self.settings.seed)
        found = {"auroc": float(auroc(scores, truth)), "f1": f1.f1, "threshold": f1.threshold}
        return {**found, "f1_always_yes": f1.always_yes}

    def summary(self) -> list[str]:
        """What was found, in a line or a few.

        Raises:
            ValueError: no text has a score.
        """
        known = self.scores[~self.scores.isnan()]
        skipped = f"no token after the first {self.settings.skip_first}"
        if not len(known):
            raise ValueError(f"Every text has {skipped}. Try a smaller `skip_first`.")
        above = int((known > 0).sum())
        lines = [f"{len(self.texts):,} texts, score {known.mean():.4g} ± {known.std():.4g}, above 0 in {above:,}"]
        if self.missing:
            lines.append(f"{self.missing:,} texts have {skipped}, so no score.")
        if self.cut:
            lines.append(f"{self.cut:,} texts were cut at {self.settings.max_length} tokens (max_length).")
        labels = [label for label in self.labels or () if label is not None]
        if quality := self.quality():
            lines.append(
                f"{sum(labels):,} of {len(labels):,} labelled texts have label 1: AUROC {quality['auroc']:.3f}, "
                f"F1 {quality['f1']:.3f} at {quality['threshold']:.4g} (threshold from half of them, F1 of the "
                f"others; F1 {quality['f1_always_yes']:.3f} if every text is called positive)"
            )
        elif labels:
            lines.append(f"No AUROC: the {len(labels):,} labels are all {labels[0]}.")
        return lines

    def rows(self) -> list[dict[str, Any]]:
        """One for each text: row, score (None where it is missing), label."""
        labels = self.labels or [None] * len(self.texts)
        return [
            {"row": number, "score": None if score != score else score, "label": label}
            for number, (score, label) in enumerate(zip(self.scores.tolist(), labels, strict=True))
        ]

    def to_frame(self) -> DataFrame:
        """Row, score, label and text of each, as a pandas DataFrame."""
        return to_frame([{**row, "text": text} for row, text in zip(self.rows(), self.texts, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what was measured and how, without the texts."""
        facts = {"feature": self.feature, "sae": self.sae, "texts": len(self.texts), "missing": self.missing}
        return {**facts, "cut": self.cut, **self.quality(), "settings": dataclasses.asdict(self.settings)}

    def plot(self, path: str | Path) -> Path | None:
        """How the scores of each label are distributed; None without matplotlib."""
        groups: dict[str, list[float]] = {"label 1": [], "label 0": [], "no label": []}
        for row in self.rows():
            if row["score"] is not None:
                groups["no label" if row["label"] is None else f"label {row['label']}"].append(row["score"])
        return plot_histograms(groups, path, f"score by feature {self.feature} of SAE {self.sae}")

    def save(self, path: str | Path) -> None:
        """Write row, score and label of each text as .csv."""
        save_csv(path, self.rows())

    def _repr_html_(self) -> str:
        ranked = sorted(zip(self.rows(), self.texts, strict=True), key=lambda pair: -(pair[0]["score"] or -torch.inf))
        return html_table([{**row, "text": text[:200]} for row, text in ranked])


def detect(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    feature: int | str,
    labels: Sequence[int | None] | None = None,
    settings: DetectSettings | None = None,
    *,
    sae: int = 0,
    progress: Progress | None = None,
) -> DetectResult:
    """Score texts by one feature; with labels, `quality()` says how well it tells them apart.

    Args:
        texts: a string, a list, a `Dataset`, a DataFrame, token ids, a path: see `text_input.TEXTS`.
        feature: number of a latent, or the name of a concept.
        labels: 0, 1 or None for unknown, one for each text.
        sae: number of the feature's SAE.

    Raises:
        ValueError: the feature is not there, labels do not fit, or a setting is unknown.
        TypeError: `texts` holds no texts.
    """
    settings = settings or DetectSettings()
    number = model.config.sae_configs[sae].resolve_feature(feature)
    settings = replace(settings, max_length=reading_length(model, settings.max_length, 256))
    found = tokenized(tokenizer, texts, max_length=settings.max_length or 0, text_column=settings.text_column)
    if labels is not None and len(labels) != len(found.texts):
        raise ValueError(f"Expected a label for each of {len(found.texts)} texts. Received: {len(labels)} labels.")
    scores = torch.full((len(found.ids),), torch.nan)
    there = [i for i, row in enumerate(found.ids) if row]
    count = Count(progress, len(there))
    for batch in batches_of([found.ids[i] for i in there], tokens_at_once=settings.tokens_per_batch):
        answer = model.detect(
            {"input_ids": batch.ids, "attention_mask": batch.mask}, feature=number, sae=sae,
            pooling=settings.pooling, pre_activations=settings.pre_activations, skip_first=settings.skip_first,
        )  # fmt: skip
        scores[[there[i] for i in batch.texts.tolist()]] = answer.per_text.float().cpu()
        count(len(batch.texts))
    return DetectResult(
        number, sae, found.texts, scores, None if labels is None else list(labels), found.cut, settings
    )


def read_rows(
    source: str, text_column: str = "text", label_column: str = "label"
) -> tuple[list[str], list[int | None]]:
    """A table's texts, and the label of each: 0, 1, or None where there is none.

    Args:
        source: a file, a folder, a URL or a Hub data set, as `open_text` takes it.

    Raises:
        ValueError: no column of that name.
    """
    rows = list(open_text(source).rows())
    texts = [str(text) for text in column_of(rows, source, text_column)]
    return texts, [LABEL_NAMES.get(str(row.get(label_column)).strip().lower()) for row in rows]
