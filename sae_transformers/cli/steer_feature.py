"""The verb `steer-feature`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.generate import parse_feature
from ..workflows.settings.steer_feature import SteerFeatureSettings
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console
from .verb import verb


@verb(SteerFeatureSettings, renamed={"coefficient": "strength"}, leave_out=("batch_size",), writes="file")
def steer_feature(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What is continued.")],
    feature: Annotated[str, typer.Option(help="The latent's number, or its name; SAE:latent for a later SAE.")],
    strength: Annotated[float, typer.Option(help="How much of its decoder row is added.")],
    settings: SteerFeatureSettings,
    sae: Saes = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv: steered, unsteered.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Steer with one feature: the same prompt continued with and without, side by side."""
    number, name = parse_feature(feature)
    from rich.table import Table

    from ..workflows.loading import load
    from ..workflows.steering.steer_feature import steer_feature as continue_both

    loaded, tokenizer, _ = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    found = continue_both(loaded, tokenizer, prompt, name, strength, settings, sae=number)
    console = open_console()
    table = Table(f"feature {feature}, {strength:g} {settings.unit}", "unsteered", show_lines=True)
    for row in found.rows():
        table.add_row(*row.values())
    console.print(table)
    if out is not None:
        found.save(out)
        console.print(f"{out}")
