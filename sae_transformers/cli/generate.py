"""The verbs `generate` and `steer-feature`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.generate import GenerateOptions, parse_feature
from ..workflows.settings.llm import visible
from ..workflows.settings.steer_feature import SteerFeatureSettings
from ..workflows.settings.texts import read_lines
from .errors import sentence
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, progress_bar, show_rows, show_saved
from .verb import verb


@verb(GenerateOptions, writes="file")
def generate(
    model: Model,
    settings: GenerateOptions,
    prompt: Annotated[str | None, typer.Argument(help="Continued; without it, each line that is typed.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line.")] = None,
    sae: Saes = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv: prompt, sample, steering, text.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Continue prompts with steering and without, side by side; a prompt, a file of them, or typed line by line."""
    if prompt is not None and prompts is not None:
        raise ValueError("Give a prompt or `prompts`. Received: both.")
    lines = [] if prompts is None else read_lines(prompts)
    from ..workflows.loading import load
    from ..workflows.results import save_csv
    from ..workflows.steering.generate import generate as continue_prompts
    from ..workflows.steering.typed_edits import typed_steerings

    steerings, options = typed_steerings(settings.steering, model) or None, settings.settings
    loaded, tokenizer, _ = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    for steering in (steerings or {}).values():
        loaded.prepare_steering(steering.with_tokenizer(tokenizer))  # what is wrong is no fault of a typed line
    console, rows = open_console(), []
    if steerings is None and not loaded.steering:
        console.print("Nothing is steered: the model has no steering of its own; see --feature, --scale, --steering.")
    if prompts is not None or options.generation.samples_per_prompt > 1:
        with progress_bar("texts") as progress:
            found = continue_prompts(
                loaded, tokenizer, lines or prompt or list(_typed_lines()), steerings, options, progress=progress
            )
        show_rows(console, found.table())
        rows += found.rows()
    else:
        for line in _typed_lines() if prompt is None else [prompt]:
            try:
                rows += continue_prompts(loaded, tokenizer, line, steerings, options, on_text=_Growing()).rows()
            except ValueError as error:  # of this line; others follow
                typer.echo(visible(sentence(error)), err=True)
            typer.echo()
    if out is not None:
        save_csv(out, rows)
        console.print(f"{out}")


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
    show_saved(console, found, out)


class _Growing:
    """Shows texts while they grow, each under its steering."""

    label = ""

    def __call__(self, label: str, piece: str) -> None:
        if label != self.label:
            typer.secho(visible(f"\n{label}" if self.label else label), bold=True)
            self.label = label
        typer.echo(visible(piece), nl=False)


def _typed_lines() -> Iterator[str]:
    """What is typed, until the end of the input."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()
