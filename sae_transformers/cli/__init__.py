"""The command line: `sae-transformers VERB`. Each verb parses, calls one function and shows its result."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from .errors import remember_options
from .verb import VerbCommand

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


# In the order of --help. A verb's function is in the file of its name, or in this one.
VERBS = {
    "Begin": "quickstart attach convert check",
    "Train": "concept_data harvest train",
    "Read features": "detect features spans explain judge feature_table ask_features dashboard",
    "Steer": "generate steer steer_feature concept_set select_knowledge select_behaviour align_topic reduce_bias",
    "Classify": "classify",
    "Evaluate, publish, serve": "evaluate card push space serve",
}
FILES = {"attach": "checkpoints", "convert": "checkpoints", "features": "detect", "explain": "annotate"}
FILES |= {"judge": "annotate", "card": "publish", "push": "publish"}
FLAGS = {"train": {"allow_extra_args": True, "ignore_unknown_options": True}}  # every setting is a flag

for panel, names in VERBS.items():
    for name in names.split():
        function = getattr(import_module(f".{FILES.get(name, name)}", __name__), name)
        app.command(cls=VerbCommand, rich_help_panel=panel, context_settings=FLAGS.get(name))(function)
