"""The verbs `card`, `push` and `space`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.publish import CardSettings, PushSettings, SpaceSettings
from .errors import fail
from .tables import open_console, show_lines
from .verb import verb

LICENCE = typer.Option("--license", help="Licence of the Space, as the Hub names it.")


@verb(CardSettings)
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, an SAE, a data set of this library or a metric.")],
    settings: CardSettings,
    results: Annotated[Path | None, typer.Option(help="The results.json of evaluate.")] = None,
    facts: Annotated[
        Path | None, typer.Option(help="YAML or JSON: licence, training_data, languages, intended_use, authors, ...")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="Table of explain or judge: what features mean.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="User/name on the Hub; by default push fills it in.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's id on the Hub, for the config's folder.")] = None,
) -> None:
    """Write README.md from what is known of a model or a data set; what is not known is said to be so."""
    from ..workflows.publish import card as write_card

    result = write_card(
        folder, settings, results=results, facts=facts, annotations=annotations, repo_id=repo_id, base=base
    )
    console = open_console()
    show_lines(console, result.summary())


@verb(PushSettings, renamed={"type": "kind"})
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, an SAE, a data set or a Space.")],
    repo_id: Annotated[str, typer.Argument(help="User/name on the Hub.")],
    settings: PushSettings,
    dashboard: Annotated[Path | None, typer.Option(help="Folder or file that goes to dashboard/.")] = None,
    space: Annotated[Path | None, typer.Option(help="Folder of a Space of the same name, pushed after it.")] = None,
) -> None:
    """Publish model, code, card and dashboard in one commit, after checks; then load them back."""
    from ..workflows.publish import NotAsPushed
    from ..workflows.publish import push as push_folder

    try:
        push_folder(folder, repo_id, settings, dashboard=dashboard, space=space, notice=open_console().print)
    except NotAsPushed as error:
        fail(error, code=1)


@verb(SpaceSettings, own={"licence": LICENCE}, writes="folder")
def space(
    model_id: Annotated[str, typer.Argument(help="A published causal language model with SAEs: its Hub id.")],
    settings: SpaceSettings,
    out: Annotated[Path, typer.Option(help="Folder of app.py, requirements.txt and README.md.")] = Path("space"),
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=LATENT or NAME=SAE:LATENT, for the page's list, by default the model's own. Repeatable."
        ),
    ] = None,
) -> None:
    """Write the folder of a Gradio Space that detects and steers with a published model; push --space uploads it."""
    from ..workflows.space import named_feature
    from ..workflows.space import space as write_space

    features = dict(named_feature(text) for text in feature or ())
    show_lines(open_console(), write_space(model_id, out, settings, features=features).summary())
