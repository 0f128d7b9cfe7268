"""What an export is made of: a page of features, its SAE, and the names that others give both."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...hub_cards.dashboard_data import OWN_ACTIVATION, DashboardData, SpanShown
from ...latents.annotations.table import FOLDED, Description, FeatureAnnotations
from ...modeling import SparseAutoencoder

SITES = {"resid_pre": "res", "resid_post": "res", "mlp_out": "mlp", "attn_out": "att"}
ID = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class KnownFeatures:
    """Features to write.

    Args:
        page: what is known of them. features: their numbers.
        sae: that they are of.
        notes: descriptions beside it, all of them; the page has one each.
        tokenizer: of the base.
    """

    page: DashboardData
    features: Sequence[int]
    sae: SparseAutoencoder
    notes: FeatureAnnotations | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def check_spans(self) -> None:
        """
        Raises:
            ValueError: spans are scored by something else than the SAE's own activation.
        """
        scored = any(span.activations for spans in self.page.spans.values() for span in spans)
        if scored and self.page.activation != OWN_ACTIVATION and self.sae.config.activation != "relu":
            raise ValueError(
                f"Others expect the SAE's own activations: collect spans with activation='own'. Received: spans of "
                f"{self.page.activation}."
            )

    def spans(self, feature: int) -> list[SpanShown]:
        """The spans of a feature that have activations, best first."""
        return [span for span in self.page.spans.get(feature, ()) if len(span.activations) == len(span.tokens) > 0]

    def descriptions(self, feature: int) -> list[Description]:
        """All that is said of a feature, each text once."""
        found = [] if self.notes is None else self.notes.of(feature)
        said = self.page.annotations.get(feature)
        if said is not None and said.meaning and said.meaning not in [one.text for one in found]:
            found.append(Description(said.meaning))
        return found

    def frequency(self, feature: int) -> float | None:
        """The share of tokens on which a feature is active: as counted for histograms or a table, else as told."""
        page = self.page
        if page.histograms is not None and page.histograms.n_tokens:
            return int(page.histograms.counts[feature].sum()) / page.histograms.n_tokens
        if page.table is not None and page.table.sparsity is not None:
            value = float(page.table.sparsity[feature])
            return None if math.isnan(value) else 10.0**value if value > -9.5 else 0.0
        return None if self.notes is None else self.notes.number("frequency", feature)

    def maximum(self, feature: int) -> float | None:
        """The largest activation, in the SAE's own unit: as it knows, as its spans say, or as told."""
        known = [float(self.sae.feature_max[feature])]
        known += [value for span in self.spans(feature) for value in span.activations if value is not None]
        if top := max((value for value in known if not math.isnan(value)), default=0.0):
            return top
        told = None if self.notes is None else self.notes.number("maximum", feature)
        if told is None or self.notes is None or self.notes.facts.get("maxima") != FOLDED:
            return told
        return told / max(self.norm(feature), 1e-12)

    def norm(self, feature: int) -> float:
        """Of a feature's decoder row."""
        return float(self.sae.W_dec[feature].detach().float().norm())

    # -- names ----------------------------------------------------------------------------------------------------

    def model_id(self, given: str | None) -> str:
        """The base as others call it: by default the last part of its name, in small letters.

        Raises:
            ValueError: it is not known, or no name of a folder.
        """
        known = self.page.facts.get("Base model") or self.sae.config.metadata.get("base_model")
        name = given or str(known or "").rstrip("/").rsplit("/", 1)[-1].lower()
        if not ID.fullmatch(name) or name.startswith("."):
            raise ValueError(
                f"`model_id` must be the base's name among others, such as gemma-2-2b. Received: {name or given!r}."
            )
        return name

    def layer(self) -> int:
        """Number of the block that the SAE reads at; 0 where its place names none."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.sae.config.read_at if self.sae.config.placed else "")
        return int(found[1]) if found else 0

    def source_set(self, given: str | None) -> str:
        """The SAEs of all layers as others call them: by default by site and width.

        Raises:
            ValueError: no name of a folder.
        """
        width = self.sae.config.d_sae
        site = SITES.get(self.sae.config.site or "", "sae")
        name = given or f"sae-transformers-{site}-{f'{width // 1024}k' if width >= 1024 else width}"
        if not ID.fullmatch(name) or name.startswith("."):
            raise ValueError(f"`source_set` must be a name without '/' or spaces. Received: source_set={given!r}.")
        return name


def finite(values: Sequence[Any]) -> list[float]:
    """Numbers for JSON: what is not known, or no number, is 0."""
    return [0.0 if value is None or not math.isfinite(value) else float(value) for value in values]
