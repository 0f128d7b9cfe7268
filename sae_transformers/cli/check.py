"""The verb `check`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import HookPoint, Model, Saes
from .tables import open_console
from .verb import verb


@verb()
def check(
    model: Model,
    sae: Saes = None,
    hook_point: HookPoint = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative difference, 1e-4 in float32.")] = None,
) -> None:
    """Compare what must be equal on a model of yours: idle and base, with and without the cache, padded and alone."""
    from ..modeling import SaeForCausalLM
    from ..workflows.loading import load_saes

    options: dict[str, Any] = {"revision": revision} if revision else {}
    if sae:
        options["saes"] = [one for name in sae for one in load_saes(name, hook_point)]
    loaded = (SaeForCausalLM.from_base if sae else SaeForCausalLM.from_pretrained)(model, **options)
    report = loaded.check(tolerance=tolerance)
    open_console().print(str(report))
    if not report:
        raise typer.Exit(1)
