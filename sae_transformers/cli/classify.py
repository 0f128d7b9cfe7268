"""The verb `classify`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.classify import ClassifyOptions
from .options import HookPoint, Model, ModelDtype
from .tables import open_console, progress_bar, show_lines, show_rows
from .verb import verb

unintended_option = partial(typer.Option, rich_help_panel="Unintended features")


@verb(
    ClassifyOptions,
    own={"label_column": typer.Option(help="Column of the label; a,b,c for several.", rich_help_panel="Data")},
    leave_out=("lora_learning_rate", "lora_batch_size", "lora_seed", "journal"),
    writes="folder",
)
def classify(
    model: Model,
    train: Annotated[str, typer.Argument(help="Rows with a text and its label: .csv, .jsonl, .parquet, a Hub id.")],
    settings: ClassifyOptions,
    sae: Annotated[str | None, typer.Option(help="The SAE at whose place the classifier reads, for a base.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results and classifier.")] = Path("outputs/classifier"),
    test: Annotated[
        str | None, typer.Option(help="Rows to measure on. [default: cross-validation]", rich_help_panel="Data")
    ] = None,
    unintended: Annotated[
        str | None,
        unintended_option(
            help="Features: a list (.txt, .csv, .json) or a table of judge (.tsv, .parquet), or its URL."
        ),
    ] = None,
    judgements: Annotated[
        str, unintended_option(help="Judgements of judge's table that must all say so, as 0,1 for both.")
    ] = "0",
    original: Annotated[
        str | None, unintended_option(help="Rows to measure a swap on; --swapped has the others.")
    ] = None,
    swapped: Annotated[str | None, unintended_option(help="The same rows with an attribute swapped.")] = None,
    swap_words: Annotated[
        str | None,
        unintended_option(help="he:she,him:her: in place of --original, the rows that have one of the words."),
    ] = None,
    swap_column: Annotated[str, unintended_option(help="Column of the text of --original and --swapped.")] = "text",
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Compare classifiers that may and may not use some features, and save the one to publish."""
    if (original is None) != (swapped is None) or (original and swap_words):
        raise ValueError("Give --original with --swapped, or --swap-words. Received: something else.")
    numbers = [int(number) for number in judgements.split(",")]
    from ..workflows.classify import classify as compare
    from ..workflows.classify import load_classifier_base, read_labelled
    from ..workflows.loading import load_sae
    from ..workflows.unintended import make_swaps, read_swaps, read_unintended

    console = open_console()
    data = read_labelled(train, test, settings.columns)
    console.print(data.describe())
    swaps = None
    if original is not None and swapped is not None:
        swaps = read_swaps(original, swapped, swap_column)
    elif swap_words is not None:
        swaps = make_swaps(data.texts.get("test", data.texts["train"]), swap_words)
    if unintended is not None and "://" not in unintended and not Path(unintended).is_file():
        raise FileNotFoundError(f"There is no file {unintended!r}.")
    one = None if sae is None else load_sae(sae, hook_point)
    loaded, tokenizer, one, _ = load_classifier_base(model, data, one, hook_point=hook_point, model_dtype=model_dtype)
    features = None if unintended is None else read_unintended(unintended, one, numbers)
    plan = replace(settings.settings, journal=out / "classify.partial.jsonl")
    with progress_bar("texts") as progress:
        found = compare(loaded, tokenizer, data, plan, sae=one, unintended=features, swaps=swaps, progress=progress)
    found = replace(found, facts={"model": found.facts["model"], "sae": sae or model, **found.facts})
    console.print(f"{len(found.facts['unintended']):,} of {one.config.d_sae:,} features are unintended")
    title = f"{found.measured_on}, {len(found.facts['seeds'])} seeds: mean ± 95 % interval"
    for columns in found.columns():  # not wider than a terminal
        show_rows(console, [{name: row[name] for name in columns} for row in found.table()], title=title)
    show_lines(console, found.summary())
    results, *drawn, folder = found.save(out)
    picture = drawn[0] if drawn else "no plot: pip install sae-transformers[plots]"
    console.print(f"{results}, {picture}")
    console.print(f"AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, trust_remote_code=True)")
