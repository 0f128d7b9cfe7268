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
Out = Annotated[Path, typer.Option(help="Table to write, without ending: it becomes .tsv and .parquet.")]
LLMModel = Annotated[str | None, asking(help="Name of the model at the server.")]
BaseUrl = Annotated[str | None, asking(help="A server with OpenAI's interface. [default: OpenAI]")]
LocalModel = Annotated[str | None, asking(help="Instead of a server: a model's folder or Hub id, run here.")]
KeyEnv = Annotated[str, asking(help="Environment variable of the key, which is sent to the server.")]
Concurrency = Annotated[int, asking(help="Requests at a time.")]
MaxTokensTotal = Annotated[int | None, asking(help="Tokens that this run may use, of prompts and answers.")]
MaxCost = Annotated[float | None, asking(help="Money that this run may use, in the unit of the prices.")]
PriceIn = Annotated[float | None, asking(help="Of 1,000,000 tokens of prompts.")]
PriceOut = Annotated[float | None, asking(help="Of 1,000,000 tokens of answers.")]
MaxAttempts = Annotated[int, asking(help="Of a request.")]
Timeout = Annotated[float, asking(help="Seconds of an attempt.")]
Cache = Annotated[Path | None, asking(help="Folder of the answers, from which an interrupted run goes on.")]
MaxTokens = Annotated[int | None, asking(help="Of an answer; more for models that think first.")]
Extra = Annotated[str, asking(help="JSON: further fields of each request.")]
Structured = Annotated[
    bool, asking("--structured/--plain", help="Ask for JSON; a server that rejects this is asked for text.")
]
BatchSize = Annotated[int, asking(help="Of --local-model.")]
First = Annotated[int | None, typer.Option(help="Use the first features only.")]
DryRun = Annotated[bool, asking("--dry-run", help="Print the estimate and end.")]
BatchFile = Annotated[
    Path | None, asking(help="Write the requests for OpenAI's Batch API, and end. With --submit: send them.")
]
Submit = Annotated[bool, asking("--submit", help="Upload --batch-file and start the batch.")]
BatchResults = Annotated[
    list[str] | None, asking(help="Results of a batch, a file or the batch's id, to begin with. Repeatable.")
]


def parse_feature(text: str) -> tuple[int, int | str]:
    """`9`, `1:9`, `joy` or `1:joy` -> (SAE, latent or name)."""
    sae, colon, rest = text.partition(":")
    if not colon or not sae.isdecimal():
        sae, rest = "0", text
    return int(sae), int(rest) if rest.isdecimal() else rest
