"""The verbs `detect`, `features` and `attribute`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.detect import METHODS, AttributionSettings, DetectSettings
from ..workflows.settings.generate import parse_feature
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, progress_bar, show_lines, show_rows, show_saved
from .verb import verb

Text = Annotated[str, typer.Argument(help="The text itself.")]
Shown = Annotated[int, typer.Option("--k", help="Features shown.")]
PRE_ACTIVATIONS = typer.Option("--pre-activations/--activations", help="Score before the activation function.")


@verb(DetectSettings, own={"pre_activations": PRE_ACTIVATIONS}, writes="file")
def detect(
    model: Model,
    texts: Annotated[str, typer.Argument(help="Rows with a text: .csv, .jsonl, .parquet, .txt, a Hub id.")],
    feature: Annotated[str, typer.Option(help="A latent's number or a concept's name; SAE:latent for a later SAE.")],
    settings: DetectSettings,
    sae: Saes = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv: row, score, label.")] = None,
    label_column: Annotated[str, typer.Option(help="Column of the label, 0 or 1; rows need not have it.")] = "label",
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Score texts by one feature; with labels, say how well it tells them apart."""
    number, name = parse_feature(feature)
    from ..workflows.loading import load
    from ..workflows.reading.detect import detect as detect_texts
    from ..workflows.reading.detect import read_rows

    rows, labels = read_rows(texts, settings.text_column, label_column)
    loaded, tokenizer, _ = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    console = open_console()
    with progress_bar("texts") as progress:
        found = detect_texts(loaded, tokenizer, rows, name, labels, settings, sae=number, progress=progress)
    show_saved(console, found, out)
    show_lines(console, found.summary())


@verb(writes="file")
def features(
    model: Model,
    text: Text,
    sae: Saes = None,
    number: Annotated[int, typer.Option(help="Which of the model's SAEs, from 0.")] = 0,
    k: Shown = 10,
    per_token: Annotated[bool, typer.Option("--per-token", help="The strongest of each token.")] = False,
    skip_first: Annotated[int, typer.Option(help="Leading tokens that are not read.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv: every token's features.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Show which features a text has: the strongest of each token, with names where they are known."""
    from ..workflows.loading import load
    from ..workflows.reading.top_features import top_features

    loaded, tokenizer, _ = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    found = top_features(loaded, tokenizer, text, k, sae=number, skip_first=skip_first)
    console = open_console()
    show_saved(console, found, out)
    rows = found.rows() if per_token else found.strongest(k)
    if rows:
        show_rows(console, rows, title=f"{len(found.tokens)} tokens, SAE {found.sae}")
    else:
        console.print("No feature is active.")


@verb(AttributionSettings, writes="file")
def attribute(
    model: Model,
    text: Text,
    settings: AttributionSettings,
    target: Annotated[list[str] | None, typer.Option(help="Token or label; two: difference [default: best]")] = None,
    position: Annotated[str | None, typer.Option(help="Token that is explained, or number of the one before.")] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = METHODS[0],
    sae: Saes = None,
    k: Shown = 10,
    out: Annotated[
        Path | None, typer.Option(help="Every feature at every token: .csv, or .json for dashboard.")
    ] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Say which features, at which tokens, made the model say what it says."""
    from ..workflows.loading import load_with_head
    from ..workflows.reading.attribute import attribute as attribute_text

    loaded, tokenizer, _ = load_with_head(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    place = int(position) if position and position.lstrip("-").isdecimal() else position
    with progress_bar("rows") as progress:
        options = {"position": place, "settings": settings, "progress": progress}
        found = attribute_text(loaded, tokenizer, text, target or None, method, **options)
    console = open_console()
    show_saved(console, found, out)
    show_lines(console, found.summary())
    show_rows(console, found.strongest(k), title=f"effects on {found.target}")
