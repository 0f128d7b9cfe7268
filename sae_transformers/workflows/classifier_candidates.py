"""What `classify` compares: each method, as strong as it may be, on the states that its heads read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..create_training_data.classification_data import ClassificationData
from ..evaluation.journal import Watch
from ..modeling import SaeForSequenceClassification, SparseAutoencoder
from ..modeling.feature_head import FeatureHead, FeatureHeadConfig
from ..training.heads.comparison import Candidate, read_texts
from ..training.heads.erasure import leace, project_out
from ..training.heads.settings import HeadSettings
from .settings.classify import ComparisonSettings

ERASURES = {"projection": project_out, "leace": leace}


class Way(NamedTuple):
    """A method, and how strong it is: features or directions that it takes out, or its penalty; None without any."""

    method: str
    strength: float | None = None

    def __str__(self) -> str:
        if self.strength is None:
            return self.method
        if self.method == "pairing":
            return f"{self.method} (penalty {self.strength:g})"
        return f"{self.method} ({self.strength:g} {'directions' if self.method in ERASURES else 'features'})"


@dataclass(frozen=True)
class FeatureSets:
    """Features that are taken out, (m,) int64 each, by how many; and as many drawn at random."""

    unintended: Mapping[int, Tensor]
    random: Mapping[int, Tensor]

    @classmethod
    def of(cls, features: Tensor, sizes: tuple[int, ...], sae: SparseAutoencoder) -> FeatureSets:
        """The first of some features, as many as each size says; drawn by seed 0."""
        drawn = torch.randperm(sae.config.d_sae, generator=torch.Generator().manual_seed(0))
        counts = sorted({min(size, len(features)) for size in sizes})
        return cls({n: features[:n] for n in counts}, {n: drawn[:n] for n in counts})

    @property
    def largest(self) -> Tensor:
        """All of the unintended ones."""
        return self.unintended[max(self.unintended)]

    def by_way(self, methods: tuple[str, ...]) -> dict[Way, Tensor]:
        """Those that the methods take out."""
        kinds = {"selfreg": self.unintended, "random": self.random}
        return {Way(name, n): found for name in kinds if name in methods for n, found in kinds[name].items()}


class ReadStates(NamedTuple):
    """States (n, d_in), or (n, 2, d_in) of pairs, by part: as they are, and without the features of each way."""

    plain: dict[str, Tensor]
    without: dict[Way, dict[str, Tensor]]


def read_states(
    model: SaeForSequenceClassification,
    ids: Mapping[str, list[Tensor]],
    data: ClassificationData,
    features: Mapping[Way, Tensor],
    head: Mapping[str, Any],
    *,
    tokens_per_batch: int,
    watch: Watch,
) -> ReadStates:
    """What heads score of each part's texts, in one pass of the model.

    Args:
        ids: part -> token ids (length,) of each text; of pairs chosen and rejected in turn.
        features: what each way takes out.
        head: of the feature head, how it reads: pooling, max_norm and removal.
    """
    sae: Any = model.saes[0]
    heads = [FeatureHead(FeatureHeadConfig(**{**head, "removal": "none"}), sae.config.d_in, 1, 1)]
    for taken in features.values():
        one = FeatureHead(FeatureHeadConfig(**head), sae.config.d_in, sae.config.d_sae, 1).to(sae.device)
        one.unintended[0, taken.to(sae.device)] = True
        heads.append(one)
    found = ReadStates({}, {way: {} for way in features})
    for part, rows in ids.items():
        states = read_texts(model, rows, heads, tokens_at_once=tokens_per_batch, report=watch.report, keep=watch.keep)
        pairs = data.pairs and part in data.texts
        for parts, values in zip((found.plain, *found.without.values()), states, strict=True):
            parts[part] = values.view(-1, 2, values.shape[-1]) if pairs else values
    return found


class Reactions(NamedTuple):
    """How states react to the swap. directions: (d, k), erasures take the first of them. differences: of the pairs."""

    directions: Tensor
    differences: SparseAutoencoder


def candidate(
    way: Way,
    settings: HeadSettings,
    states: ReadStates,
    sae: SparseAutoencoder,
    features: Mapping[Way, Tensor],
    reactions: Reactions | None,
) -> Candidate:
    """What heads are trained on in one way.

    Args:
        settings: of the heads of its method.
        features: what each way takes out, of the SAE.
        reactions: of the pairs that tell which directions react.
    """
    if way in features:
        return Candidate(settings, states.without[way], features[way], sae)
    if reactions is None or way.strength is None:
        return Candidate(settings, states.plain)
    if way.method == "pairing":
        pairs, one = reactions.differences, replace(settings, penalty=way.strength)
        return Candidate(one, states.plain, torch.arange(pairs.config.d_sae), pairs)
    taken = reactions.directions[:, : int(way.strength)]
    return Candidate(settings, states.plain, erasure=ERASURES[way.method](states.plain["train"].flatten(0, -2), taken))


def all_ways(
    plan: ComparisonSettings, methods: tuple[str, ...], features: Mapping[Way, Tensor], reactions: Reactions | None
) -> list[Way]:
    """Each method as strong as it may be, in the order of the methods."""
    found: list[Way] = []
    for name in methods:
        if name in ERASURES and reactions is not None:
            most = reactions.directions.shape[1]
            found += [Way(name, n) for n in sorted({min(n, most) for n in plan.directions})]
        elif name == "pairing" and reactions is not None:
            found += [Way(name, penalty) for penalty in plan.pairing]
        else:
            found += [way for way in features if way.method == name] or [Way(name)]
    return found
