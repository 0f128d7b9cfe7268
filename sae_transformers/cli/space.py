"""The verb `space`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.publish import SpaceSettings
from .tables import open_console, show_lines
from .verb import verb

LICENCE = typer.Option("--license", help="Licence of the Space, as the Hub names it.")


@verb(SpaceSettings, own={"licence": LICENCE}, writes="folder")
def space(
    model_id: Annotated[str, typer.Argument(help="A published causal language model with SAEs: its Hub id.")],
    settings: SpaceSettings,
    out: Annotated[Path, typer.Option(help="Folder of app.py, requirements.txt and README.md.")] = Path("space"),
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=LATENT or NAME=SAE:LATENT, for the page's list, by default the model's own. Repeatable."
        ),
    ] = None,
) -> None:
    """Write the folder of a Gradio Space that detects and steers with a published model; push --space uploads it."""
    features = dict(named_feature(text) for text in feature or ())
    from ..workflows.space import space as write_space

    show_lines(open_console(), write_space(model_id, out, settings, features=features).summary())


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
