"""Options that several verbs take, told once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# -- of models and texts

Model = Annotated[str, typer.Argument(help="A model with SAEs, as attach or steer writes it, or a base.")]
Saes = Annotated[list[str] | None, typer.Option(help="An SAE for a base, as attach takes it. Repeatable.")]
HookPoint = Annotated[str | None, typer.Option(help="Where an SAE reads that does not say it itself.")]
FoldDecoderNorm = Annotated[
    bool, typer.Option("--fold-decoder-norm", help="Unit decoder rows, latents times their norms, as on Neuronpedia.")
]
Base = Annotated[str, typer.Argument(help="Base model: a folder or a Hub id.")]
TextColumn = Annotated[str, typer.Option(help="Column of the text.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the label, 0 or 1.")]
ModelDtype = Annotated[str, typer.Option(help="auto: float32 on a CPU, else as published.")]

Table = Annotated[
    Path,
    typer.Argument(
        help="Features: .tsv or .parquet with FeatureID and Words, or the folder of spans or feature-table."
    ),
]
