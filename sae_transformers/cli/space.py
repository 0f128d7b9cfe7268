"""The verb `space`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(space)


def space(
    model_id: Annotated[str, typer.Argument(help="A published causal language model with SAEs: its Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of app.py, requirements.txt and README.md.")] = Path("space"),
    revision: Annotated[
        str | None, typer.Option(help="Commit of the model. [default: the one that is there now]")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=LATENT or NAME=SAE:LATENT, for the page's list. Repeatable. [default: the model's own]"
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Of the Space, as the Hub names it.")] = None,
) -> None:
    """Write the folder of a Gradio Space that detects and steers with a published model; push --space uploads it."""
    settings = dict(locals())
    from .errors import guarded

    guarded(_space, settings)


def _space(s: dict[str, Any], console: Any) -> None:
    from ..hub_cards.space import write_space

    features = dict(named_feature(text) for text in s["feature"] or ())
    files = write_space(
        s["model_id"], s["out"], revision=s["revision"], features=features, title=s["title"], licence=s["licence"]
    )
    console.print(" ".join(str(file) for file in files), markup=False)


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
