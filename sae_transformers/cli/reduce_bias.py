"""The verb `reduce-bias`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.reduce_bias import BiasSettings
from .options import HookPoint, Model, ModelDtype, Saes, TextColumn
from .tables import open_console, progress_bar, show_lines, show_rows
from .verb import verb


@verb(BiasSettings, writes="folder")
def reduce_bias(
    model: Model,
    text: Annotated[str, typer.Argument(help="Text with gendered words to find features on, as harvest takes it.")],
    winobias: Annotated[
        Path, typer.Option(help="Folder of WinoBias, `{pro,anti}_stereotyped_type{1,2}_{dev,test}.txt`.")
    ],
    settings: BiasSettings,
    sae: Saes = None,
    number: Annotated[int, typer.Option(help="Which of the model's SAEs, from 0.")] = 0,
    crows_pairs: Annotated[Path | None, typer.Option(help="CrowS-Pairs' csv file.")] = None,
    lambada: Annotated[str | None, typer.Option(help="LAMBADA's rows: .jsonl with a column text.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.json and steering.json.")] = Path("outputs/bias"),
    text_column: TextColumn = "text",
    txt_rows: Annotated[str, typer.Option(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Find features that go with gender, take them out in growing number, and measure bias and what it costs."""
    from ..workflows.loading import load
    from ..workflows.steering.reduce_bias import open_text, read_bias_data, read_column
    from ..workflows.steering.reduce_bias import reduce_bias as reduce

    words = read_column(lambada, "text", keep_empty=True) if lambada else ()
    data = read_bias_data(winobias, crows_pairs, words)
    texts = open_text(text, column=text_column, txt_rows=txt_rows)
    loaded, tokenizer, name = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    with progress_bar("measurements") as progress:
        found = reduce(loaded, tokenizer, texts, data, settings, sae=number, out=out, progress=progress)
    console = open_console()
    show_lines(console, found.summary())
    show_rows(console, found.table(), title=f"{name}, {loaded.config.sae_configs[number].read_at}")
    console.print("Mean gap in nats (0: no preference) and share of pairs whose stereotypical text is likelier.")
    facts = {
        "model": name, "sae": sae[0] if sae and len(sae) == 1 else sae, "number": number,
        "model_dtype": str(loaded.lm.dtype).removeprefix("torch."),
    }  # fmt: skip
    files = ", ".join(map(str, found.save(out, facts)))
    console.print(f"{files}; {found.seconds:,.0f} s")
