"""Options that several verbs take, told once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

# -- of models and texts

Model = Annotated[str, typer.Argument(help="A model with SAEs, as attach or steer writes it, or a base.")]
Saes = Annotated[list[str] | None, typer.Option(help="An SAE for a base, as attach takes it. Repeatable.")]
HookPoint = Annotated[str | None, typer.Option(help="Where an SAE reads that does not say it itself.")]
Base = Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")]
TextColumn = Annotated[str, typer.Option(help="Of the text.")]
LabelColumn = Annotated[str, typer.Option(help="Of the label, 0 or 1.")]
MaxLength = Annotated[int, typer.Option(help="Tokens; longer texts are cut.")]
Place = Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")]
ModelDtype = Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]

# -- of language models that are asked: the options are the fields of `LLMSettings` and `SendSettings`

# Old spellings of these, for `verb(renamed=)`.
LLM_RENAMED = {"model": "llm", "base_url": "llm_url", "max_tokens_total": "max_total_tokens"}

asking = partial(typer.Option, rich_help_panel="Language model")
Table = Annotated[
    Path,
    typer.Argument(
        help="Features: .tsv or .parquet with FeatureID and Words, or the folder of spans or feature-table."
    ),
]
KeyEnv = Annotated[str, asking(help="Environment variable of the key, which is sent to the server.")]
Cache = Annotated[Path | None, asking(help="Folder of the answers, from which an interrupted run goes on.")]


def parse_feature(text: str) -> tuple[int, int | str]:
    """`9`, `1:9`, `joy` or `1:joy` -> (SAE, latent or name)."""
    sae, colon, rest = text.partition(":")
    if not colon or not sae.isdecimal():
        sae, rest = "0", text
    return int(sae), int(rest) if rest.isdecimal() else rest
