"""Which features a text has: the strongest of each token, with names where they are known."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...evaluation.plots import plot_bars
from ...latents.context import reading_length
from ...latents.text_input import tokenized
from ...latents.text_latents import feature_names, sae_of
from ...modeling.modeling_sae import SaePreTrainedModel
from ..results import Result, save_csv


@dataclass(frozen=True)
class TopFeaturesResult(Result):
    """The strongest features of each token of one text.

    Args:
        text: that was read. tokens: its n tokens as text.
        features: (n, k) int64, strongest first; -1 where fewer are active. values: (n, k) float32, activations.
        names: feature -> what it is called, of those that have a name.
        sae: number of the SAE. cut: whether the text was cut.
    """

    text: str
    tokens: list[str]
    features: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    names: dict[int, str]
    sae: int
    cut: bool

    def strongest(self, k: int = 10) -> list[dict[str, Any]]:
        """The text's features by their strongest token: feature, name, max, tokens (how many), at (that token)."""
        active = self.features >= 0
        token = torch.arange(len(self.tokens))[:, None].expand_as(self.features)[active]
        values = self.values[active]
        order = values.abs().argsort(descending=True, stable=True)
        numbers, of = self.features[active][order].unique(return_inverse=True)
        rank = torch.arange(len(order))
        first = torch.full((len(numbers),), len(order)).scatter_reduce_(0, of, rank, "amin")  # its strongest token
        counts = torch.bincount(of, minlength=len(numbers))
        found = []
        for i in first.argsort()[:k].tolist():
            place, number = order[first[i]], int(numbers[i])
            row = {"feature": number, "name": self.names.get(number, ""), "max": float(values[place])}
            found.append({**row, "tokens": int(counts[i]), "at": self.tokens[int(token[place])]})
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One for each token and feature: position, token, feature, name, value."""
        return [
            {"position": n, "token": token, "feature": f, "name": self.names.get(f, ""), "value": value}
            for n, token in enumerate(self.tokens)
            for f, value in zip(self.features[n].tolist(), self.values[n].tolist(), strict=True)
            if f >= 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"text": self.text, "tokens": self.tokens, "sae": self.sae, "cut": self.cut, "features": self.rows()}

    def plot(self, path: str | Path, k: int = 20) -> Path | None:
        """A bar for each of the strongest features, as long as its largest activation; None without matplotlib."""
        found = {f"{row['feature']} {row['name']}".strip(): row["max"] for row in self.strongest(k)}
        return plot_bars(found, path, f"largest activation in {len(self.tokens)} tokens")

    def save(self, path: str | Path) -> None:
        """Write `rows()` as .csv."""
        save_csv(path, self.rows())

    def _repr_html_(self) -> str:
        """The tokens, coloured by their strongest activation; each names its features when pointed at."""
        top = float(self.values.abs().max()) or 1.0
        shown = []
        for n, token in enumerate(self.tokens):
            share = float(self.values[n].abs().max()) / top
            told = ", ".join(
                f"{self.names.get(f, f)} {value:.3g}"
                for f, value in zip(self.features[n].tolist(), self.values[n].tolist(), strict=True)
                if f >= 0
            )
            shown.append(
                f'<span title="{html.escape(told, quote=True)}" style="background:rgba(0,150,136,{share:.2f})">'
                f"{html.escape(token)}</span>"
            )
        return f'<p style="line-height:1.8;white-space:pre-wrap">{"".join(shown)}</p>'


def top_features(
    model: SaePreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    k: int = 10,
    *,
    sae: int = 0,
    skip_first: int = 1,
    max_length: int | None = None,
    names: Mapping[int, str] | None = None,
) -> TopFeaturesResult:
    """The features of a text, token by token; `strongest()` sums them up.

    Args:
        text: one text, or its token ids.
        k: features of a token, at most.
        sae: number of the SAE.
        skip_first: leading tokens that are not read: the first one is an outlier.
        max_length: tokens; a longer text is cut. By default 1,024, or what the model reads.
        names: feature -> name, beside the SAE's own concepts, feature names and, where it has `annotations`, their
            descriptions.

    Raises:
        ValueError: not one text, or no such SAE.
    """
    found = tokenized(tokenizer, text, max_length=reading_length(model, max_length, 1024))
    if len(found.texts) != 1:
        raise ValueError(f"Expected one text. Received: {len(found.texts)}.")
    one = sae_of(model, sae)
    ids = torch.tensor(found.ids)
    read = model.top_features(ids, k=k, sae=sae, skip_first=skip_first)
    features, values = read.features[0].cpu(), read.values[0].float().cpu()
    active = set(features.unique().tolist()) - {-1}
    named = feature_names(one, active, names)
    tokens = [str(tokenizer.decode([token])) for token in found.ids[0]]
    return TopFeaturesResult(found.texts[0], tokens, features, values, named, sae, found.cut > 0)
