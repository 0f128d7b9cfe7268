"""The folder of a Gradio Space that detects and steers with a published model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub_cards.space import write_space
from .settings.publish import SpaceSettings


@dataclass(frozen=True)
class SpaceResult:
    """A Space's folder.

    Args:
        files: app.py, requirements.txt and README.md; `push(folder, repo_id, space=...)` uploads them.
    """

    files: list[Path]

    def summary(self) -> list[str]:
        """The files, in a line."""
        return [" ".join(str(file) for file in self.files)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"files": [str(file) for file in self.files]}


def space(
    model_id: str | Path,
    out: str | Path = "space",
    settings: SpaceSettings | None = None,
    *,
    features: Mapping[str, int | tuple[int, int]] | None = None,
) -> SpaceResult:
    """Write the folder of a Gradio Space that detects and steers with a published model.

    Args:
        model_id: a published `SaeForCausalLM`. A folder works too, for a page on this machine.
        out: folder.
        features: names for the page's list: name -> latent, or (SAE, latent); beside the model's own.

    Raises:
        ValueError: the model is no `SaeForCausalLM`, or has no such feature.
        OSError: it cannot be read.
    """
    settings = settings or SpaceSettings()
    files = write_space(
        str(model_id), out, revision=settings.revision, features=features, title=settings.title,
        licence=settings.licence,
    )  # fmt: skip
    return SpaceResult(files)


def named_feature(text: str) -> tuple[str, tuple[int, int]]:
    """Name, and SAE and latent, of "joy=17" or "joy=1:17".

    Raises:
        ValueError: it is neither.
    """
    name, equals, place = text.rpartition("=")
    sae, _, latent = place.rpartition(":")
    if not (name.strip() and equals and (sae or "0").isdecimal() and latent.isdecimal()):
        raise ValueError(f"A named feature is NAME=LATENT or NAME=SAE:LATENT. Received: {text!r}.")
    return name.strip(), (int(sae or 0), int(latent))
