"""Choose, on the dev questions, how many features are edited by how much at which SAEs, towards each side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ....evaluation.knowledge import knowledge_metrics
from ....modeling import Steering
from ....training.steering.functional_features import FunctionalFeatures, functional_steering, select_features
from ...settings.select_knowledge import SIDES, FeatureSelectionSettings
from .answers import AskedModel, share


class EditSetting(NamedTuple):
    """proportion: K. degree: the strength alpha. saes: numbers of the SAEs that are edited.

    `results.json` has these names.
    """

    proportion: float
    degree: float
    saes: tuple[int, ...]


class ChosenSettings(NamedTuple):
    """settings: of each side. tried: all that were tried, as rows. broken: sides where every setting leaves more
    questions without either answer than it may."""

    settings: dict[str, EditSetting]
    tried: list[dict[str, Any]]
    broken: tuple[str, ...]


def edit_settings(selection: FeatureSelectionSettings, n_saes: int) -> list[EditSetting]:
    """All settings that are to be tried, weak ones first.

    Raises:
        ValueError: `layers` names an SAE that is not there.
    """
    known = {str(n): n for n in range(n_saes)}
    sets = [one.split("+") for one in selection.layers] or [list(known)]
    if unknown := {n for one in sets for n in one} - set(known):
        raise ValueError(f"`layers` holds numbers of {n_saes} SAEs. Received: {sorted(unknown)}.")
    numbers = [tuple(known[n] for n in one) for one in sets]
    return [
        EditSetting(proportion, degree, saes)
        for saes, degree, proportion in itertools.product(numbers, selection.strengths, selection.proportions)
    ]


def knowledge_steering(
    features: Sequence[FunctionalFeatures], side: str, setting: EditSetting, *, legacy: bool = False
) -> Steering:
    """The steering towards a side with one setting."""
    layers = [
        (n, features[n], *select_features(features[n], proportion=setting.proportion, legacy=legacy))
        for n in setting.saes
    ]
    return functional_steering(layers, towards=SIDES.index(side), degree=setting.degree)


def choose_settings(
    asked: AskedModel, features: Sequence[FunctionalFeatures], rows: Sequence[int], settings: Sequence[EditSetting]
) -> ChosenSettings:
    """Towards each side the setting that `best_setting` takes."""
    sides = asked.settings.sides
    if len(settings) == 1:
        return ChosenSettings(dict.fromkeys(sides, settings[0]), [], ())
    selection = asked.settings.selection
    prompts = asked.prompts(rows, asked.settings.questions.split_seed)
    before = asked.behaviours(rows, asked.answers(prompts))
    most = knowledge_metrics(before)["neither"] + selection.max_broken
    tried: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for side, setting in itertools.product(sides, settings):
        steering = knowledge_steering(features, side, setting, legacy=selection.legacy)
        after = asked.behaviours(rows, asked.answers(prompts, steering=steering))
        likelier = share(asked.prefers_memory(rows, prompts, steering))
        tried[side].append({**knowledge_metrics(after, before), "prefers_memory": likelier})
    best = {side: best_setting(tried[side], side, most) for side in sides}
    rows_tried = [
        {"towards": side, **setting._asdict(), **metrics}
        for side in sides
        for setting, metrics in zip(settings, tried[side], strict=True)
    ]
    broken = tuple(side for side in sides if tried[side][best[side]]["neither"] > most)
    return ChosenSettings({side: settings[best[side]] for side in sides}, rows_tried, broken)


def best_setting(tried: Sequence[Mapping[str, float]], side: str, most: float) -> int:
    """Which of the settings, weakest first, steers best to a side.

    Of those that leave at most a share `most` of the questions without either answer, the one with the most answers of
    that side; of equal ones the one that makes them the likelier, and then the first. If all leave more, the one that
    leaves the fewest: to break answers is not to choose between them.
    """
    allowed = [n for n, metrics in enumerate(tried) if metrics["neither"] <= most]
    if not allowed:
        return min(range(len(tried)), key=lambda n: tried[n]["neither"])

    def reached(n: int) -> tuple[float, float]:
        memory = tried[n]["prefers_memory"]
        return tried[n][f"em_{side}"], memory if side == "memory" else 1 - memory

    return max(allowed, key=reached)
