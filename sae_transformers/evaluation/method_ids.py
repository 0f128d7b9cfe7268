"""What a measurement is of, as data: its kind, its SAE and its latent. Nothing reads them back from a label.

Records that were written before had labels only; `old_method` reads those, and is the one place that does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# Kinds that have a latent: by its activation, and before the activation function.
FEATURE, PRE_ACTIVATION = "feature", "pre_activation"
# Kinds that the others of their metric are compared with, the first that there is.
COMPARED = ("none", "base", "diffmean", "hidden_tree", "zeros", "random_latent")


@dataclass(frozen=True)
class MethodId:
    """A method that was measured.

    Args:
        kind: `feature`, `pre_activation`, a word of `COMPARED`, or another word of its suite.
        label: how it is shown; `Measurement.method` has it.
        sae: number of its SAE; None where it has none, or the record does not say.
        feature: number of its latent; in an old record, perhaps the name of its concept.
        name: of the concept, where the feature was asked for by its name.
        baseline: whether it needs nothing of the SAEs' features and is what others are compared with.
    """

    kind: str
    label: str = ""
    sae: int | None = None
    feature: int | str | None = None
    name: str = ""
    baseline: bool = False

    def labelled(self, label: str) -> MethodId:
        """The same under another label."""
        return replace(self, label=label)

    def to_dict(self) -> dict[str, Any]:
        """What a record keeps beside the label and `baseline`, which the measurement has."""
        told = {"kind": self.kind, "sae": self.sae, "feature": self.feature, "name": self.name or None}
        return {key: value for key, value in told.items() if value is not None}


def baseline_method(kind: str, label: str) -> MethodId:
    """A method that others are compared with."""
    return MethodId(kind, label, baseline=True)


def feature_methods(
    named: dict[str, tuple[int, int]], features: Sequence[tuple[int, int | str]] | None
) -> dict[str, MethodId]:
    """Label -> method, of features by their activation.

    Args:
        named: of `named_features`: label -> SAE and latent.
        features: as they were asked for, by number or by name; None: the concepts, by name.
    """
    names = {f"{feature} of SAE {sae}": feature for sae, feature in features or () if isinstance(feature, str)}
    made = {}
    for label, (sae, latent) in named.items():
        name = label.removesuffix(f" of SAE {sae}") if features is None else names.get(label, "")
        made[label] = MethodId(FEATURE, label, sae, latent, name)
    return made


# -- records of before ----------------------------------------------------------------------------------------------

OLD_BASELINES = re.compile(
    r"(none|prompt|diffmean|linear probe|bag of words|tree on hidden|random|base|unsteered|zeros?|mean)\b",
    re.IGNORECASE,
)
OLD_STARTS = ("none", "base", "DiffMean", "tree on hidden states", "zeros at", "random latent")  # as in `COMPARED`
OLD_DETECTOR = re.compile(r"(?:(?:latent|feature) (?P<latent>\d+)|(?P<concept>.+?))(?: of SAE (?P<sae>\d+))?")
OLD_BEFORE = " before activation"
OLD_LATENT = re.compile(r"\b(?:latent|feature) (\d+)\b")
OLD_SAE = re.compile(r" of SAE (\d+)")


def old_method(label: str, baseline: bool | None) -> MethodId:
    """The method of a measurement that has its label only, as well as a label can tell."""
    is_baseline = bool(OLD_BASELINES.match(label)) if baseline is None else baseline
    kind = next((kind for kind, start in zip(COMPARED, OLD_STARTS, strict=True) if label.startswith(start)), "")
    if not kind or baseline is False:
        kind = PRE_ACTIVATION if label.endswith(OLD_BEFORE) else FEATURE
    found = OLD_DETECTOR.fullmatch(label.removesuffix(OLD_BEFORE))
    if found is None:
        return MethodId(kind, label, baseline=is_baseline)
    sae = None if found["sae"] is None else int(found["sae"])
    latent = None if found["latent"] is None else int(found["latent"])
    if latent is None:  # one that is named on the way, such as `tree on latent 5`
        return MethodId(kind, label, sae, found["concept"], found["concept"] or "", is_baseline)
    return MethodId(kind, label, sae, latent, "", is_baseline)


def old_steered_latent(label: str) -> MethodId | None:
    """The latent that a label of the suite `steering` names by its number; None where it names none."""
    latent, sae = OLD_LATENT.search(label), OLD_SAE.search(label)
    return latent and MethodId(FEATURE, label, None if sae is None else int(sae[1]), int(latent[1]))


def names_a_latent(method: MethodId, written: bool) -> bool:
    """Whether a method is of one latent that was given by its number; written: whether the record has the id."""
    return isinstance(method.feature, int) and not method.name if written else bool(OLD_LATENT.search(method.label))
