"""The verb `mcp`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import HookPoint, Model, ModelDtype, Saes
from .verb import verb


@verb()
def mcp(
    model: Model,
    sae: Saes = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in answers. [default: its folder or id]")] = None,
    allow_write: Annotated[Path | None, typer.Option(help="Folder for steerings; else nothing is written.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
) -> None:
    """Give agents tools by the Model Context Protocol, on stdin and stdout: find, read, detect, steer, evaluate."""
    from ..mcp_server.launching import serve_tools

    serve_tools(
        model, sae, name=name, write_to=allow_write, hook_point=hook_point, model_dtype=model_dtype, revision=revision
    )
