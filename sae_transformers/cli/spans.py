"""The verb `spans`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(spans)


def spans(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    text: Annotated[str, typer.Argument(help="Text, as harvest takes it.")],
    sae: Annotated[str, typer.Option(help="The SAE, as attach takes it.")],
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the result. An interrupted run continues.")],
    top_n: Annotated[int, typer.Option(help="Spans of a latent, each of another row of text.")] = 10,
    window: Annotated[int, typer.Option(help="Tokens of a span.")] = 10,
    include_peak: Annotated[
        bool, typer.Option("--include-peak/--exclude-peak", help="A span ends with the strongest token, or before it.")
    ] = True,
    activation: Annotated[
        str, typer.Option(help="relu: of the pre-activations; or own: the SAE's activation.")
    ] = "relu",
    min_score: Annotated[float, typer.Option(help="Weaker spans are left out.")] = 0.0,
    template: Annotated[
        str | None, typer.Option(help="What the model reads, with {text} where a row goes. [default: the row]")
    ] = None,
    template_file: Annotated[Path | None, typer.Option(help="The same, from a file.")] = None,
    last_tokens: Annotated[int | None, typer.Option(help="Only so many tokens at a text's end count.")] = None,
    skip_first: Annotated[
        bool, typer.Option("--skip-first/--keep-first", help="The first token of a sequence is an outlier in norm.")
    ] = True,
    outlier_ratio: Annotated[
        float, typer.Option(help="Tokens so many times as long as the median do not count. 0: all do.")
    ] = 10.0,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence; longer ones are cut.")] = 256,
    place: Annotated[
        str | None, typer.Option(help="Of an SAE that does not say: layers.14.resid_post, or a module path.")
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text; a.b is field b of column a.")] = "text",
    txt_rows: Annotated[str, typer.Option(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    split: Annotated[str, typer.Option(help="Of a Hub data set.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a Hub data set as it is needed.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    model_dtype: Annotated[
        str, typer.Option(help="The model runs in it. auto: float32 on a CPU, else as published.")
    ] = "auto",
    rows_per_block: Annotated[int, typer.Option(help="Rows of text whose hidden states are in memory.")] = 256,
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 4096,
    max_rows: Annotated[int | None, typer.Option(help="Use the first rows only.")] = None,
) -> None:
    """The stretches of text on which each latent is strongest. With torchrun, each process does its part."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see quickstart
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..create_training_data.shards import rank_and_world
    from ..create_training_data.spans import SpanSettings, collect_spans
    from ..latents.texts import open_text
    from .errors import fail
    from .loading import load_base, load_sae

    try:
        if template_file is not None:
            if template is not None:
                raise ValueError(f"Give --template or --template-file. Received: both, {template!r}.")
            template = template_file.read_text(encoding="utf-8")
        settings = SpanSettings(
            top_n=top_n,
            window=window,
            include_peak=include_peak,
            activation=activation,
            min_score=min_score,
            template="{text}" if template is None else template,
            last_tokens=last_tokens,
            skip_first=skip_first,
            outlier_ratio=outlier_ratio or None,
            max_length=max_length,
            rows_per_block=rows_per_block,
            tokens_at_once=tokens_at_once,
        )
        source = open_text(text, column=column, split=split, subset=subset, streaming=streaming, txt_rows=txt_rows)
        if max_rows is not None:
            source = source.first(max_rows)
        autoencoder = load_sae(sae, place)
        base, tokenizer, _ = load_base(model, revision, model_dtype)
        found = collect_spans(base, tokenizer, autoencoder.to(base.device), source, settings, out=out, progress=True)
    except torch.OutOfMemoryError as error:
        fail(f"{error} Try a smaller --tokens-at-once or --rows-per-block.", code=1)
    except (ValueError, OSError, TypeError, ImportError) as error:
        fail(error, code=2)
    if not found.complete:
        rank, _ = rank_and_world()
        Console().print(f"process {rank}: its part of {out} is done; others are still at work")
        return
    table = Table("texts", "tokens", "spans", "latents with spans", "latents", title=out)
    with_spans = len(found.feature.unique())
    table.add_row(*(f"{n:,}" for n in (found.n_texts, found.n_tokens, len(found.span), with_spans, found.d_sae)))
    Console().print(table)
