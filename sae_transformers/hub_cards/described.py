"""What a card says of the annotations beside a model's SAEs."""

from __future__ import annotations

from typing import Any

from ..latents.annotations.table import FeatureAnnotations
from .facts import ModelFacts


def annotations_of(model: ModelFacts) -> dict[int, tuple[str, FeatureAnnotations]]:
    """SAE -> the file beside it and what that says; of those that have one.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for sae in model.saes:
        name = f"annotations-{sae.number}.parquet" if sae.number else "annotations.parquet"
        if name in model.files:
            found[sae.number] = name, FeatureAnnotations.load(model.folder / name)
    return found


def described(model: ModelFacts) -> list[dict[str, Any]]:
    """For each SAE with annotations: its number, how many features are described, file, megabytes, facts."""
    return [
        {
            "sae": number, "described": len(notes.described), "features": len(notes), "file": name,
            "megabytes": (model.folder / name).stat().st_size / 1e6, "facts": notes.facts,
        }
        for number, (name, notes) in annotations_of(model).items()
    ]  # fmt: skip
