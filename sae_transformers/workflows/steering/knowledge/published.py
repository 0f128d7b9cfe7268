"""A selection from published caches alone: no model, no question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ....modeling import SaeForCausalLM, Steering
from ....training.steering.functional_features import functional_steering, scored, select_features
from ....training.steering.published_features import PublishedFeatures, read_published_features
from ...results import Result, save_json
from ...settings.select_knowledge import SIDES, SelectKnowledgeSettings
from ..functional import save_steerings
from .choice import EditSetting, edit_settings


class LayerSelection(NamedTuple):
    """The selected latents of one SAE, (m,) int64 each, the most informative first.

    sae: number of the SAE in a model that has one for each layer. published: what they were selected from.
    """

    sae: int
    published: PublishedFeatures
    context: Tensor
    memory: Tensor

    @property
    def name(self) -> str:
        """How lines and tables call the layer."""
        return f"SAE {self.sae}" if self.published.layer is None else f"layer {self.published.layer}"


@dataclass(frozen=True)
class PublishedSelection(Result):
    """The features of both sides, and the steering where functional values are published too.

    Args:
        steering: side -> the steering towards it; empty where functional values are missing.
        layers: what was selected of each SAE.
        setting: proportion, degree and SAEs.
        settings: how it was done.
    """

    steering: dict[str, Steering] = field(repr=False)
    layers: list[LayerSelection] = field(repr=False)
    setting: EditSetting
    settings: SelectKnowledgeSettings = field(repr=False)

    def summary(self) -> list[str]:
        """How many features there are of each side, and what the steering is, in a few lines."""
        lines = [
            f"{layer.name}: {len(layer.context)} features of the context, {len(layer.memory)} of memory"
            for layer in self.layers
        ]
        if not self.steering:
            return [*lines, f"no steering: {missing_values(self.layers)}"]
        return [
            *lines,
            *(
                f"to {side}: proportion {self.setting.proportion:g}, strength {self.setting.degree:g}; "
                f"{len(steering.edits)} edits"
                for side, steering in self.steering.items()
            ),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each selected feature: sae, layer, side, feature, information in nats, expectation."""
        return [
            {
                "sae": layer.sae,
                "layer": layer.published.layer,
                "side": side,
                "feature": feature,
                "information": float(layer.published.mutual_information[feature]),
                "expectation": float(layer.published.expectation[feature]),
            }
            for layer in self.layers
            for side in SIDES
            for feature in getattr(layer, side).tolist()
        ]

    def table(self) -> list[dict[str, str]]:
        """A row for each SAE and side, with the most informative features."""
        return [
            {
                "layer": layer.name,
                "side": side,
                "features": str(len(getattr(layer, side))),
                "first": ", ".join(map(str, getattr(layer, side)[:3].tolist())),
            }
            for layer in self.layers
            for side in SIDES
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `results.json` has it."""
        facts = {"features": self.settings.published.features, "legacy": self.settings.selection.legacy}
        facts["layers"] = [layer.published.layer for layer in self.layers]
        return {"chosen": dict.fromkeys(self.settings.sides, self.setting._asdict()), "facts": facts}

    def save(self, folder: str | Path) -> None:
        """Write `selected.json`, `results.json` and, with functional values, `towards-SIDE.json` of each side and
        `features-N.safetensors` of each SAE."""
        features = [scored(layer.published) for layer in self.layers] if self.steering else []
        save_steerings(folder, features, self.steering, self.to_dict())
        save_json(folder, {"selected.json": self.rows()})


def select_published_knowledge(settings: SelectKnowledgeSettings) -> PublishedSelection:
    """Select features from a published cache, `settings.published.features`, without a model.

    Edits need functional values too. Where the cache has none there is a selection and no steering: `select_knowledge`
    with the same settings learns the values from a model and questions.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder is named, a file of it is missing or wrong, or there are several settings to choose from,
            for which questions are needed.
    """
    source = settings.published
    if source.features is None:
        raise ValueError("Expected questions, or `features`, the folder of a published cache. Received: neither.")
    published = read_published_features(source.features, source.feature_layers)
    tried = edit_settings(settings.selection, len(published))
    if len(tried) > 1:
        raise ValueError(
            f"Without questions to choose on, expected one of `proportions`, `strengths` and `layers`. "
            f"Received: {len(tried)} settings of them."
        )
    setting = tried[0]
    layers = []
    for number in setting.saes:
        found = select_features(
            scored(published[number]), proportion=setting.proportion, legacy=settings.selection.legacy
        )
        layers.append(LayerSelection(number, published[number], *found))
    return PublishedSelection(_steering(layers, settings, setting.degree), layers, setting, settings)


def published_for(model: SaeForCausalLM, settings: SelectKnowledgeSettings) -> list[PublishedFeatures] | None:
    """What is published of each of the model's SAEs; None where the settings name no folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is missing or wrong, or the cache is of other SAEs.
    """
    source = settings.published
    if source.features is None:
        return None
    own = [sae.config.layer for sae in model.saes]
    layers = source.feature_layers or tuple(layer for layer in own if layer is not None)
    published = read_published_features(source.features, layers)
    widths = [sae.config.d_sae for sae in model.saes]
    found = [len(one.expectation) for one in published]
    if found != widths:
        raise ValueError(
            f"Expected features of the model's {len(widths)} SAEs, with {widths} latents at the layers {own}. "
            f"Received: {source.features!r} with {found} latents of the layers {[one.layer for one in published]}."
        )
    return published


def missing_values(layers: Sequence[LayerSelection]) -> str:
    """Which layers have no functional values, and what gives them."""
    names = [layer.name for layer in layers if layer.published.values is None]
    return (
        f"use_context_weight.pt and use_parameter_weight.pt are not there for {', '.join(names)}; with questions they "
        f"are learnt from the model"
    )


def _steering(
    layers: Sequence[LayerSelection], settings: SelectKnowledgeSettings, degree: float
) -> dict[str, Steering]:
    if any(layer.published.values is None for layer in layers):
        return {}
    edited = [(layer.sae, scored(layer.published), layer.context, layer.memory) for layer in layers]
    return {side: functional_steering(edited, towards=SIDES.index(side), degree=degree) for side in settings.sides}
