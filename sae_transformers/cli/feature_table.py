"""The verb `feature-table`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.feature_table import FeatureTableSettings
from ..workflows.settings.texts import TextSettings
from .options import HookPoint, Model, ModelDtype
from .tables import open_console, progress_bar, show_lines, show_rows
from .verb import verb


@dataclass(frozen=True)
class Options:
    """
    Args:
        table: what is said of each feature.
        rows: which texts are read.
    """

    table: FeatureTableSettings = field(default_factory=FeatureTableSettings)
    rows: TextSettings = field(default_factory=TextSettings)


FOLD = typer.Option("--fold-norm/--keep-norm", help="Count the gain of the final norm in the unembedding.")


@verb(Options, own={"fold_norm": FOLD}, leave_out=("journal",), writes="folder")
def feature_table(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of features.parquet, .csv and .json, words.tsv and facts.json.")],
    settings: Options,
    sae: Annotated[str | None, typer.Option(help="The SAE for a base, as attach takes it.")] = None,
    number: Annotated[int, typer.Option(help="Which of a saved model's SAEs, from 0.")] = 0,
    spans: Annotated[
        str | None, typer.Option(help="Folder that the verb spans wrote: its strongest contexts join the table.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to count firing on, as harvest takes it.")] = None,
    save_sae: Annotated[
        Path | None, typer.Option(help="With --text: folder to save the SAE to, with its largest activations.")
    ] = None,
    hook_point: HookPoint = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """What each feature writes: statistics of its logit weights, top and bottom tokens, frequency, contexts."""
    if save_sae is not None and text is None:
        raise ValueError("--save-sae needs --text, on which the activations are measured. Received: no --text.")
    texts = None if text is None else settings.rows.open(text)
    from ..workflows.loading import load, load_sae
    from ..workflows.reading.feature_table import feature_table as make_table
    from ..workflows.reading.feature_table import read_spans, sae_of

    examples = None if spans is None else read_spans(spans)
    one = None if sae is None else load_sae(sae, hook_point)
    loaded, tokenizer, _ = load(model, None if one is None else [], model_dtype=model_dtype, revision=revision)
    one = sae_of(loaded, number) if one is None else one
    table = replace(settings.table, journal=out / "features.partial.jsonl")
    with progress_bar("done") as progress:
        found = make_table(loaded, tokenizer, table, sae=one, texts=texts, spans=examples, progress=progress)
    console = open_console()
    tokens = found.table.facts["tokens"]
    console.print(f"{len(found.table):,} features x {tokens:,} tokens in {found.seconds:.1f} s")
    console.print(found.text(width=console.width))
    files = found.save(out, {"sae": sae or f"{model} {number}", **({} if spans is None else {"spans": spans})})
    show_rows(console, found.statistics(), title=f"{len(found.table):,} features")
    show_lines(console, found.summary())
    if save_sae is not None:
        one.save_pretrained(save_sae)
        files.append(save_sae)
    console.print(" ".join(str(file) for file in files))
