"""The verb `concept-set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.concept_set import ConceptSetSettings
from .tables import open_console, progress_bar, show_asked
from .verb import verb


@verb(ConceptSetSettings, leave_out=("extra",), writes="folder")
def concept_set(
    concepts: Annotated[Path, typer.Argument(help="Concepts in words, one a line.")],
    out: Annotated[Path, typer.Option(help="Folder, in AxBench's layout.")],
    settings: ConceptSetSettings,
    instructions: Annotated[
        Path | None, typer.Option(help="Instructions to answer, one a line. [default: the model makes them up]")
    ] = None,
) -> None:
    """Have a chat model write texts with and without concepts, to find features and to measure detectors by."""
    from ..workflows.steering.concept_set import concept_set as write_concepts

    with progress_bar("answers") as progress:
        result = write_concepts(
            concepts, settings, instructions=instructions, progress=progress, notice=open_console().print
        )
    show_asked(result, out)
