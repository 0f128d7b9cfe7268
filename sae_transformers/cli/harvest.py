"""The verb `harvest`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .errors import fail
from .loading import load_base


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(harvest)


def harvest(
    model: Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")],
    text: Annotated[
        str,
        typer.Argument(
            help="Text: a .txt, .jsonl, .json, .csv or .parquet file, a folder or glob of these, local or at any "
            "fsspec URL; or a Hub data set."
        ),
    ],
    place: Annotated[
        list[str], typer.Option(help="Where to read, e.g. layers.14.resid_post, or a module path. Repeatable.")
    ],
    out: Annotated[str, typer.Option(help="Folder or fsspec URL of the store. An interrupted harvest continues.")],
    column: Annotated[str, typer.Option(help="Column of the text; a.b is field b of column a.")] = "text",
    label: Annotated[
        list[str] | None, typer.Option(help="Column of a 0/1 label, carried to the tokens. Repeatable.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Column of a row's image or images, for a multimodal base: pictures or paths of files."),
    ] = None,
    image_tokens: Annotated[
        str, typer.Option(help="Tokens that stand for patches of an image: keep, drop, or only these.")
    ] = "keep",
    txt_rows: Annotated[str, typer.Option(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    split: Annotated[str, typer.Option(help="Of a Hub data set.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a Hub data set as it is needed.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    pack: Annotated[
        bool | None,
        typer.Option("--pack/--no-pack", help="Join short texts. [default: unless there are labels or positions]"),
    ] = None,
    positions: Annotated[str, typer.Option(help="Tokens to keep: all, last (of a text) or after_prefix.")] = "all",
    prefix_tokens: Annotated[int, typer.Option(help="Length of that prefix.")] = 0,
    skip_first: Annotated[
        bool, typer.Option("--skip-first/--keep-first", help="The first token of a sequence is an outlier in norm.")
    ] = True,
    drop_special: Annotated[bool, typer.Option("--drop-special", help="Leave out special tokens.")] = False,
    dtype: Annotated[str, typer.Option(help="Stored as bfloat16, float16 or float32.")] = "bfloat16",
    model_dtype: Annotated[
        str, typer.Option(help="The model runs in it. auto: float32 on a CPU, else as published.")
    ] = "auto",
    rows_per_shard: Annotated[int, typer.Option(help="Rows of text in a file; memory holds so many.")] = 256,
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 4096,
    max_rows: Annotated[int | None, typer.Option(help="Use the first rows only.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use the first rows that give so many tokens, up to a whole shard.")
    ] = None,
) -> None:
    """Write a model's hidden states on a text to shards. With torchrun, each process does its part."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see quickstart
    import time

    import torch
    from rich.console import Console
    from rich.table import Table

    from ..create_training_data.blocks import HarvestSettings
    from ..create_training_data.shards import harvest_to_store, rank_and_world
    from ..latents.texts import open_text

    rank, world = rank_and_world()
    start = 0.0
    try:
        settings = HarvestSettings(
            places=tuple(place),
            max_length=max_length,
            pack=pack,
            positions=positions,
            prefix_tokens=prefix_tokens,
            skip_first=skip_first,
            drop_special_tokens=drop_special,
            image_tokens=image_tokens,
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            tokens_at_once=tokens_at_once,
        )
        source = open_text(
            text,
            column=column,
            labels=label or (),
            split=split,
            subset=subset,
            streaming=streaming,
            txt_rows=txt_rows,
            images=images,
        )
        if max_rows is not None:
            source = source.first(max_rows)
        head = "AutoModelForCausalLM" if images is None else "AutoModelForImageTextToText"
        base, tokenizer, name = load_base(model, revision, model_dtype, head)
        start = time.perf_counter()
        found = harvest_to_store(
            base,
            tokenizer,
            source,
            settings,
            out,
            max_tokens=max_tokens,
            model_name=name,
            revision=revision,
            progress=True,
        )
    except torch.OutOfMemoryError as error:
        fail(f"{error} Try a smaller --tokens-at-once or --rows-per-shard.", code=1)
    except (ValueError, OSError, ImportError) as error:
        fail(error, code=2)
    speed = f"{found.new_tokens / (time.perf_counter() - start):,.0f}" if found.new_tokens else "-"
    if not found.complete and world > 1:
        Console().print(f"process {rank}: {found.new_tokens:,} tokens ({speed}/s); others are still at work")
        return
    table = Table("tokens", "shards", "bytes", "new tokens", "tokens/s", title=out)
    table.add_row(f"{found.n_tokens:,}", f"{found.n_shards:,}", f"{found.n_bytes:,}", f"{found.new_tokens:,}", speed)
    Console().print(table)
