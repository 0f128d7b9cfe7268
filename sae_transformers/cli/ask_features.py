"""The verb `ask-features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.ask_features import AskFeaturesSettings
from .options import Table
from .tables import open_console, progress_bar, show_asked
from .verb import verb


@verb(AskFeaturesSettings, renamed={"at_once": "features_per_request", "first": "max_rows"}, writes="file")
def ask_features(
    features: Table,
    question: Annotated[str, typer.Option(help="Answered for each feature, e.g. 'Does it concern gender?'.")],
    out: Annotated[Path, typer.Option(help="The .csv file to write: feature, answer, reason, failure.")],
    settings: AskFeaturesSettings,
) -> None:
    """Ask a language model one question about each feature of a table, many features to a request."""
    from ..workflows.reading.ask_features import ask_features as ask_about

    with progress_bar("requests") as progress:
        found = ask_about(features, question, settings, progress=progress, notice=open_console().print)
    show_asked(found, out)
