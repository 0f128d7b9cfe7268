"""The verb `harvest`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ..workflows.settings.harvest import HarvestOptions
from .options import Base, ModelDtype
from .tables import open_console, progress_bar, show_rows
from .verb import verb

RENAMED = {"drop_special": "drop_special_tokens", "keep_first": "skip_first 0", "skip_first": "skip_first 1"}


@verb(HarvestOptions, renamed=RENAMED, leave_out=("hook_points",))
def harvest(
    model: Base,
    text: Annotated[
        str,
        typer.Argument(
            help="Text: a .txt, .jsonl, .json, .csv or .parquet file, a folder or glob of these, local or at any "
            "fsspec URL; or a Hub data set."
        ),
    ],
    hook_point: Annotated[
        list[str], typer.Option(help="Where to read, e.g. layers.14.resid_post, or a module path. Repeatable.")
    ],
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the store. An interrupted harvest continues.")],
    settings: HarvestOptions,
    label: Annotated[list[str] | None, typer.Option(help="Column of a 0/1 label of all tokens. Repeatable.")] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Column of a row's image or images, for a multimodal base: pictures or paths of files."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The first rows of so many tokens, to a whole shard.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Write a model's hidden states on a text to shards. With torchrun, each process does its part."""
    states = replace(settings.states, hook_points=tuple(hook_point))
    source = settings.rows.open(text, label or (), images)
    from ..workflows.harvest import harvest as harvest_states
    from ..workflows.loading import load_base

    base, tokenizer, name = load_base(model, revision=revision, model_dtype=model_dtype, images=images is not None)
    with progress_bar("rows") as progress:
        found = harvest_states(
            base, tokenizer, source, out, states, max_tokens=max_tokens, model_name=name, revision=revision,
            progress=progress,
        )  # fmt: skip
    console = open_console()
    if not found.complete:
        console.print(found.summary()[0])
        return
    shown = {name: "-" if count is None else f"{count:,}" for name, count in found.rows()[0].items()}
    show_rows(console, [shown], title=out)
