"""The verb `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..workflows.settings.publish import ServeSettings
from .options import HookPoint, ModelDtype, Saes
from .tables import open_console
from .verb import verb


@verb(ServeSettings, renamed={"dtype": "model_dtype"})
def serve(
    model: Annotated[str, typer.Argument(help="A model with SAEs, or a base model: a folder or a Hub id.")],
    settings: ServeSettings,
    sae: Saes = None,
    name: Annotated[str | None, typer.Option(help="Its name in requests. [default: its folder or id]")] = None,
    steering: Annotated[
        str | None,
        typer.Option(
            help="Default steering: JSON, a file of it or its name in the model's folder; by default the model's own."
        ),
    ] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="After --: options of vLLM's own command line.")] = None,
) -> None:
    """Serve a steered model with OpenAI's interface: chat, completions, responses; steering in each request's body."""
    from ..workflows.serve import serve_named
    from ..workflows.settings.publish import Served

    console = open_console()
    served = Served(model, tuple(sae or ()), name, steering, hook_point, model_dtype, revision)
    serve_named(served, settings, options or (), notice=console.print)
    console.print("Stopped.")
