"""The verbs `concept-data` and `concept-set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.concept_set import SOURCES, ConceptDataSettings, ConceptSetSettings
from .tables import open_console, progress_bar, show_asked, show_lines
from .verb import verb


@verb(ConceptDataSettings, writes="file")
def concept_data(
    source: Annotated[str, typer.Argument(help=f"One of {', '.join(SOURCES)}.")],
    settings: ConceptDataSettings,
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv or .parquet.")],
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Files with its columns, by default the Hub's; of shakespeare original and modern."),
    ] = None,
) -> None:
    """Write texts with a concept's label, 0, 1 or unknown, by the rules of SCAR, as a table for harvest."""
    from ..workflows.concept_data import FORMATS
    from ..workflows.concept_data import concept_data as read_concept

    if out.suffix not in FORMATS:
        raise ValueError(f"`out` must end in {', '.join(FORMATS)}. Received: out={str(out)!r}.")
    found = read_concept(source, files, settings)
    found.save(out)
    show_lines(open_console(), [*found.summary(), str(out)])


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
