"""The verb `dashboard`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.dashboard import DashboardSettings, feature_list
from ..workflows.settings.texts import read_lines
from .options import HookPoint, ModelDtype
from .tables import open_console, progress_bar
from .verb import verb

RENAMED = {"plain": "no_compress", "sae_number": "number", "model": ""}
SAMPLES, TEXT = "Steering samples", "Text"


@verb(DashboardSettings, renamed=RENAMED, leave_out=("features", "steer", "samples_per_prompt"), writes="file")
def dashboard(
    settings: DashboardSettings,
    model: Annotated[
        str | None,
        typer.Argument(help="A model with SAEs or a base, for --texts and --steer. [default: the table's]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The .html file to write, or with --layout a folder.")] = Path(
        "dashboard.html"
    ),
    table: Annotated[Path | None, typer.Option(help="Folder or table that feature-table wrote.")] = None,
    spans: Annotated[str | None, typer.Option(help="Folder that spans wrote.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Table that explain or judge wrote.")] = None,
    results: Annotated[list[Path] | None, typer.Option(help="results.json of evaluate. Repeatable.")] = None,
    attributions: Annotated[list[Path] | None, typer.Option(help="attribute's --out, .json. Repeatable.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Steered texts, .json or .jsonl: feature, strength, prompt, text, perplexity.")
    ] = None,
    sae: Annotated[
        str | None, typer.Option(help="The SAE, as attach takes it: for neighbours and names. [default: the table's]")
    ] = None,
    features: Annotated[str | None, typer.Option(help="Which are shown, e.g. 1,2,5-90. [default: all]")] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Text to read with the model: histograms, and colours if it is the text of --spans.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text. [default: as in --spans, or text]", rich_help_panel=TEXT)
    ] = None,
    txt_rows: Annotated[
        str | None,
        typer.Option(
            help="A row of a .txt file: paragraph, line or file. [default: as in --spans]", rich_help_panel=TEXT
        ),
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(help="Features to write steering samples for, e.g. 3,17.", rich_help_panel=SAMPLES),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="What is continued with --steer, one a line.", rich_help_panel=SAMPLES)
    ] = None,
    save_samples: Annotated[
        Path | None, typer.Option(help="Write the samples of --steer here too, .json.", rich_help_panel=SAMPLES)
    ] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """One HTML page of an SAE's features: search, sort, histograms, spans, labels, steering; no server needed."""
    if steer is not None and prompts is None:
        raise ValueError("--steer needs --prompts, a file with one a line. Received: no --prompts.")
    wanted = replace(settings.samples, steer=() if steer is None else feature_list(steer))
    settings = replace(settings, features=None if features is None else feature_list(features), samples=wanted)
    from ..workflows.loading import load, load_base, load_sae
    from ..workflows.reading.dashboard import dashboard as make_dashboard
    from ..workflows.reading.dashboard_sources import open_text_of_spans, read_sources

    sources = read_sources(
        table=table, spans=spans, with_texts=texts is not None, annotations=annotations, results=results or (),
        samples=samples, attributions=attributions or (),
    )  # fmt: skip
    text = None if texts is None else open_text_of_spans(texts, sources, text_column, txt_rows)
    asked = [] if prompts is None else read_lines(prompts)
    names = {"Base model": model or sources.facts.get("model"), "SAE": sae or sources.facts.get("sae")}
    reads = text is not None or steer is not None
    name, sae = names["Base model"], names["SAE"] if reads else sae
    one, loaded, tokenizer = None if sae is None else load_sae(sae, hook_point), None, None
    if reads:
        if name is None:
            raise ValueError("--texts and --steer need a model and --sae. Received: no table that names them.")
        loaded, tokenizer, _ = (load if one is None else load_base)(name, model_dtype=model_dtype)
    sources = replace(sources, names={key: str(value) for key, value in names.items() if value})
    with progress_bar("done") as progress:
        found = make_dashboard(
            sources, loaded, tokenizer, settings,
            sae=one, texts=text, prompts=asked, progress=progress,
        )  # fmt: skip
    if save_samples is not None and found.samples:
        found.save_samples(save_samples)
    with progress_bar("features") as progress:
        files = (
            [found.save(out, progress)] if settings.export.layout == "html" else found.export(out, progress=progress)
        )
    size = sum(file.stat().st_size for file in files) / 1e6
    open_console().print(f"{out}: {len(found.features):,} features, {size:.1f} MB")
