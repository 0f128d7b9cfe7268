"""The command line: `sae-transformers VERB`. Each verb parses, calls one function and shows its result."""

from __future__ import annotations

import ast
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import remember_options

# In the order of --help. A verb's function is in the file of its name, or in this one.
VERBS = {
    "Begin": "quickstart attach convert check",
    "Train": "concept_data harvest train",
    "Read features": "detect features attribute spans explain judge feature_table ask_features annotate find "
    "dashboard",
    "Steer": "generate steer steer_feature concept_set select_knowledge select_behaviour align_topic reduce_bias "
    "export_steering",
    "Classify": "classify",
    "Evaluate, publish, serve": "evaluate card push space serve mcp",
}
FILES = {"attach": "checkpoints", "convert": "checkpoints", "features": "detect", "explain": "annotate"}
FILES |= {"judge": "annotate", "ask_features": "annotate", "card": "publish", "push": "publish", "space": "publish"}
FILES |= {"concept_set": "concept_data", "steer_feature": "generate", "annotate": "find", "export_steering": "steer"}
FILES |= {"attribute": "detect"}
FLAGS = {"train": {"allow_extra_args": True, "ignore_unknown_options": True}}  # every setting is a flag
# Markdown: in the other forms typer takes `[default: ...]` for markup and shows nothing.
LOOKS: Any = {"rich_markup_mode": "markdown", "add_completion": False, "pretty_exceptions_show_locals": False}


class Verb(TyperCommand):
    """A verb by its name and docstring, read from the text of its file: that is imported, and the options are made,
    when the verb is called or its options are asked for."""

    def __init__(self, name: str, panel: str) -> None:
        self.function, self.file = name, FILES.get(name, name)
        parsed = ast.parse(Path(__file__).with_name(f"{self.file}.py").read_text(encoding="utf-8"))
        written = next(one for one in ast.walk(parsed) if isinstance(one, ast.FunctionDef) and one.name == name)
        super().__init__(name.replace("_", "-"), help=ast.get_docstring(written), rich_help_panel=panel)
        del self.params, self.callback

    @cached_property
    def made(self) -> Any:
        """The command."""
        from .verb import VerbCommand

        alone = typer.Typer(**LOOKS)
        function = getattr(import_module(f".{self.file}", __name__), self.function)
        alone.command(cls=VerbCommand, context_settings=FLAGS.get(self.function))(function)
        return typer.main.get_command(alone)

    def __getattr__(self, name: str) -> Any:
        if name not in ("params", "callback"):
            raise AttributeError(name)
        return getattr(self.made, name)

    def make_context(self, *args: Any, **options: Any) -> Any:
        return self.made.make_context(*args, **options)


class Verbs(TyperGroup):
    """All verbs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for panel, names in VERBS.items():
            for name in names.split():
                self.add_command(Verb(name, panel))


app = typer.Typer(cls=Verbs, no_args_is_help=True, **LOOKS)


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
