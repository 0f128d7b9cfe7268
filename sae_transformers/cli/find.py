"""The verbs `annotate` and `find`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .tables import open_console, progress_bar, show_lines, show_rows, show_saved
from .verb import verb

SOURCES = "a file or folder of Neuronpedia, delphi, explain, spans or feature-table, or an id modelId/source"
Embedder = Annotated[str | None, typer.Option(help="A sentence-transformers model: a folder or a Hub id.")]


@verb(writes="folder")
def annotate(
    sae: Annotated[str, typer.Argument(help="An SAE, as attach takes it, or a folder of a model with SAEs.")],
    annotations: Annotated[list[str] | None, typer.Argument(help=f"{SOURCES}. [default: the SAE's own]")] = None,
    number: Annotated[int, typer.Option(help="Which of a model's SAEs, from 0.")] = 0,
    module: Annotated[str | None, typer.Option(help="Of a run of delphi that has several.")] = None,
    embedder: Embedder = None,
    out: Annotated[Path | None, typer.Option(help="Folder for it with them. [default: where it is]")] = None,
) -> None:
    """Keep what is known of features beside an SAE: descriptions with their scores, maxima, frequencies."""
    from ..workflows.reading.annotations import annotate_folder

    with progress_bar("done") as progress:
        options = {"module": module, "embedder": embedder, "progress": progress}
        lines = annotate_folder(sae, annotations or None, number=number, out=out, **options)
    show_lines(open_console(), lines)


@verb(writes="file")
def find(
    source: Annotated[str, typer.Argument(help=f"Where annotate kept them, a published SAE, or {SOURCES}.")],
    query: Annotated[str, typer.Argument(help="A few words, such as 'sarcasm'.")],
    number: Annotated[int, typer.Option(help="Which of a model's SAEs, from 0.")] = 0,
    k: Annotated[int, typer.Option("--k", help="Features shown.")] = 10,
    by: Annotated[str, typer.Option(help="words, embeddings or auto.")] = "auto",
    embedder: Embedder = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv.")] = None,
) -> None:
    """Find features by a few words, in their descriptions."""
    from ..workflows.reading.annotations import searched
    from ..workflows.reading.find import find as find_features

    with progress_bar("descriptions") as progress:
        found = find_features(searched(source, number), query, k, by=by, embedder=embedder, progress=progress)
    console = open_console()
    if found.found:
        show_rows(console, found.table(), title=f"{query}, by {found.by}")
    show_lines(console, found.summary())
    show_saved(console, found, out)
