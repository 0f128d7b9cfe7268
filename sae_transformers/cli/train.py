"""The verb `train`."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import fail


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)


def train(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="A YAML file, or topk, selfreg-pretrain, selfreg-finetune or scar.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder or URL of harvested hidden states.")] = None,
    method: Annotated[str | None, typer.Option(help="pretrain, finetune or condition.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the result: the recipe's output_dir.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    options: Annotated[bool, typer.Option("--options", help="List every other option with its meaning.")] = False,
) -> None:
    """Train SAEs on harvested hidden states. Every setting is also a flag: --d_sae 4096 --learning_rate 1e-3 ..."""
    from rich.console import Console
    from rich.table import Table

    from ..training.recipe import own_options, read_recipe
    from ..training.run import run_recipe

    if options:
        table = Table("flag", "default", "meaning")
        for name, default, meaning in own_options():
            table.add_row(f"--{name}", str(default), meaning)
        Console().print(table)
        Console().print(
            "Also every argument of transformers.TrainingArguments, and of SparseAutoencoderConfig for each SAE."
        )
        return
    sections = {"data": data, "method": method, "output_dir": out}
    given = [f"--{name}={value}" for name, value in sections.items() if value is not None]
    try:
        _, metrics = run_recipe(read_recipe(config, [*given, *context.args]), resume=resume)
    except (ValueError, OSError, TypeError) as error:
        fail(error, code=2)
    table = Table("metric", "value", title="Training")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
