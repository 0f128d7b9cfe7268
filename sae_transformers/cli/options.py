"""Options that several verbs take, told once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# -- of models and texts

Base = Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")]
TextColumn = Annotated[str, typer.Option(help="Of the text.")]
LabelColumn = Annotated[str, typer.Option(help="Of the label, 0 or 1.")]
MaxLength = Annotated[int, typer.Option(help="Tokens; longer texts are cut.")]
Place = Annotated[str | None, typer.Option(help="Of an SAE that does not say where it reads.")]
ModelDtype = Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]

# -- of language models that are asked

Table = Annotated[Path, typer.Argument(help="Features: .tsv or .parquet with FeatureID and Words, or spans' folder.")]
Out = Annotated[Path, typer.Option(help="Table to write, without ending: it becomes .tsv and .parquet.")]
Model = Annotated[str | None, typer.Option(help="Name of the model at the server.")]
BaseUrl = Annotated[str | None, typer.Option(help="A server with OpenAI's interface. [default: OpenAI]")]
LocalModel = Annotated[str | None, typer.Option(help="Instead of a server: a model's folder or Hub id, run here.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable of the key, which is sent to the server.")]
Concurrency = Annotated[int, typer.Option(help="Requests at a time.")]
MaxTokensTotal = Annotated[int | None, typer.Option(help="Tokens that this run may use, of prompts and answers.")]
MaxCost = Annotated[float | None, typer.Option(help="Money that this run may use, in the unit of the prices.")]
PriceIn = Annotated[float | None, typer.Option(help="Of 1,000,000 tokens of prompts.")]
PriceOut = Annotated[float | None, typer.Option(help="Of 1,000,000 tokens of answers.")]
MaxAttempts = Annotated[int, typer.Option(help="Of a request.")]
Timeout = Annotated[float, typer.Option(help="Seconds of an attempt.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the answers, from which an interrupted run goes on.")]
MaxTokens = Annotated[int | None, typer.Option(help="Of an answer; more for models that think first.")]
Extra = Annotated[str, typer.Option(help="JSON: further fields of each request.")]
Structured = Annotated[
    bool, typer.Option("--structured/--plain", help="Ask for JSON; a server that rejects this is asked for text.")
]
BatchSize = Annotated[int, typer.Option(help="Of --local-model.")]
First = Annotated[int | None, typer.Option(help="Use the first features only.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the estimate and end.")]
BatchFile = Annotated[
    Path | None, typer.Option(help="Write the requests for OpenAI's Batch API, and end. With --submit: send them.")
]
Submit = Annotated[bool, typer.Option("--submit", help="Upload --batch-file and start the batch.")]
BatchResults = Annotated[
    list[str] | None, typer.Option(help="Results of a batch, a file or the batch's id, to begin with. Repeatable.")
]
