"""The command line: `sae-transformers VERB`. Each verb parses, calls one function and shows its result."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from . import (
    align_topic,
    annotate,
    ask_features,
    check,
    checkpoints,
    classify,
    concept_set,
    dashboard,
    detect,
    evaluate,
    feature_table,
    harvest,
    publish,
    quickstart,
    reduce_bias,
    select_behaviour,
    select_knowledge,
    serve,
    space,
    spans,
    steer,
    steer_feature,
    train,
)
from .errors import remember_options

# Markdown: in the other forms typer takes `[default: ...]` for markup and shows nothing.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="markdown"
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sae-transformers {import_module('..', __name__).__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Sparse autoencoders as working parts of Hugging Face models."""
    remember_options(context)


# In the order of --help.
for panel, parts in {
    "Begin": (quickstart, checkpoints, check),
    "Train": (harvest, train),
    "Read features": (detect, spans, annotate, feature_table, ask_features, dashboard),
    "Steer": (steer, steer_feature, concept_set, select_knowledge, select_behaviour, align_topic, reduce_bias),
    "Classify": (classify,),
    "Evaluate, publish, serve": (evaluate, publish, space, serve),
}.items():
    there = len(app.registered_commands)
    for verbs in parts:
        verbs.register(app)
    for command in app.registered_commands[there:]:
        command.rich_help_panel = panel
