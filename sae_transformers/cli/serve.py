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
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; by default its folder or id.")
    ] = None,
    steering: Annotated[
        str | None,
        typer.Option(
            help="Default steering: JSON, a file of it or its name in the model's folder; by default the model's own."
        ),
    ] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
) -> None:
    """Serve a steered model with OpenAI's interface: chat, completions, responses; steering in each request's body."""
    from ..workflows.loading import load, read_steering
    from ..workflows.serve import open_port
    from ..workflows.serve import serve as serve_model

    console = open_console()
    with open_port(settings) as port:  # a taken one is told before the model is loaded
        default = None if steering is None else read_steering(steering, model)
        loaded, tokenizer, _ = load(
            model, sae or [], hook_point=hook_point, model_dtype=model_dtype, revision=revision
        )
        serve_model(
            loaded, tokenizer, (name or model, model), settings, steering=default, listening=port,
            notice=console.print,
        )  # fmt: skip
    console.print("Stopped.")
