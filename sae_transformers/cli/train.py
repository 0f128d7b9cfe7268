"""The verb `train`."""

from __future__ import annotations

from typing import Annotated

import typer

from .tables import open_console, show_rows
from .verb import verb


@verb()
def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help=".yaml, topk, selfreg-pretrain, selfreg-finetune, scar.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder or URL of harvested hidden states.")] = None,
    method: Annotated[str | None, typer.Option(help="pretrain, finetune or condition.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the result: the recipe's output_dir.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    options: Annotated[bool, typer.Option("--options", help="List every other option with its meaning.")] = False,
) -> None:
    """Train SAEs on harvested hidden states. Every setting is also a flag: --d_sae 4096 --learning_rate 1e-3 ..."""
    from ..workflows.train import recipe_options, train_recipe

    console = open_console()
    if options:
        known = recipe_options()
        rows = [{"flag": f"--{name}", "default": str(default), "meaning": text} for name, default, text in known]
        show_rows(console, rows)
        console.print(
            "Also every argument of transformers.TrainingArguments, and of SparseAutoencoderConfig for each SAE."
        )
        return
    sections = {"data": data, "method": method, "output_dir": out}
    flags = [f"--{name}={value}" for name, value in sections.items() if value is not None]
    result = train_recipe(config, [*flags, *context.args], resume=resume)
    show_rows(console, result.rows(), title="Training")
