"""The verb `spans`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.spans import SpanOptions
from .options import HookPoint, Model, ModelDtype
from .tables import open_console, progress_bar, show_rows
from .verb import verb

PEAK = typer.Option("--include-peak/--exclude-peak", help="A span ends with the strongest token, or before it.")


@verb(
    SpanOptions,
    renamed={"keep_first": "skip_first 0", "skip_first": "skip_first 1"},
    own={"include_peak": PEAK},
    leave_out=("template", "pre_acts_at_once", "blocks_per_save"),
)
def spans(
    model: Model,
    text: Annotated[str, typer.Argument(help="Text, as harvest takes it.")],
    settings: SpanOptions,
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the result. An interrupted run continues.")],
    sae: Annotated[str | None, typer.Option(help="The SAE for a base, as attach takes it.")] = None,
    number: Annotated[int, typer.Option(help="Which of a saved model's SAEs, from 0.")] = 0,
    template: Annotated[
        str | None, typer.Option(help="What the model reads, with {text} where a row goes. [default: the row]")
    ] = None,
    template_file: Annotated[Path | None, typer.Option(help="The same, from a file.")] = None,
    save_sae: Annotated[Path | None, typer.Option(help="Folder to save the SAE to, with its feature_max.")] = None,
    hook_point: HookPoint = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """The stretches of text on which each latent is strongest. With torchrun, each process does its part."""
    chosen = settings.spans
    if template is not None and template_file is not None:
        raise ValueError(f"Give --template or --template-file. Received: both, {template!r}.")
    if template_file is not None:
        template = template_file.read_text(encoding="utf-8")
    if template is not None:
        chosen = replace(chosen, template=template)
    source = settings.rows.open(text)
    from ..workflows.loading import load, load_base, load_sae
    from ..workflows.reading.spans import spans as find_spans

    one = None if sae is None else load_sae(sae, hook_point)
    read = load if one is None else load_base
    loaded, tokenizer, _ = read(model, model_dtype=model_dtype, revision=revision)
    with progress_bar("rows") as progress:
        which = number if one is None else one
        found = find_spans(loaded, tokenizer, source, chosen, sae=which, out=out, progress=progress)
    console = open_console()
    if not found.complete:
        console.print(f"{out}: {found.summary()[0]}")
        return
    show_rows(console, [{name: f"{count:,}" for name, count in found.counts().items()}], title=out)
    if save_sae is not None:
        found.sae.save_pretrained(save_sae)
        console.print(f"{save_sae}")
