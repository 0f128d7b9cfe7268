"""The verb `quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import fail
from .verb import verb


@verb(writes="folder")
def quickstart(
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder or a Hub id. [default: SmolLM2-135M-Instruct]")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Texts: .csv or .jsonl with columns text, label; or a Hub id. [default: Rotten Tomatoes]"),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Block whose output the SAE reads. [default: just under the middle]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("outputs/quickstart"),
    small: Annotated[bool, typer.Option("--small", help="Fewer texts, steps and samples: for a quick check.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Train a sentiment latent in a real model, detect and steer with it, save it, load it again."""
    from rich.console import Console

    from ..quickstart.run import ReloadMismatch, Stopwatch, run
    from ..quickstart.settings import Settings, prepare

    console, watch = Console(), Stopwatch()
    with watch.stage("prepare"):
        chosen = Settings(model=model, dataset=dataset, layer=layer, out=out, small=small, seed=seed)
        prepared = prepare(chosen, say=console.print)
    try:
        run(prepared, console, watch)
    except (ReloadMismatch, RuntimeError) as error:
        fail(error, code=1)
