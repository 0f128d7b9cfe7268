"""The verb `check`."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import fail


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(check)


def check(
    model: Annotated[str, typer.Argument(help="A model with SAEs: a folder or a Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference. [default: 1e-4 in float32]")
    ] = None,
) -> None:
    """Compare what must be equal on a model of yours: idle and base, with and without the cache, padded and alone."""
    from rich.console import Console

    from ..modeling import SaeForCausalLM

    try:
        report = SaeForCausalLM.from_pretrained(model, revision=revision).check(tolerance=tolerance)
    except (OSError, ValueError) as error:
        fail(error, code=2)
    Console().print(str(report), highlight=False)
    if not report:
        raise typer.Exit(1)
