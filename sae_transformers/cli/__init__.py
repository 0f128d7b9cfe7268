"""The command line: `sae-transformers VERB`. Each verb parses, calls one function and shows its result."""

from __future__ import annotations

import typer

from . import (
    align,
    annotate,
    checkpoints,
    classify,
    concepts,
    dashboard,
    evaluate,
    features,
    harvest,
    publish,
    quickstart,
    select,
    serve,
    spans,
    steer,
    train,
)

# Markdown: in the other forms typer takes `[default: ...]` for markup and shows nothing.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="markdown"
)


@app.callback()
def main() -> None:
    """Sparse autoencoders as working parts of Hugging Face models."""


# In the order of --help.
for verbs in (
    quickstart,
    checkpoints,
    harvest,
    train,
    spans,
    annotate,
    classify,
    select,
    features,
    align,
    steer,
    concepts,
    evaluate,
    publish,
    serve,
    dashboard,
):
    verbs.register(app)
