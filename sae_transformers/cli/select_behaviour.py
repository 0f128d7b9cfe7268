"""The verb `select-behaviour`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.select_behaviour import SIDES, SelectBehaviourSettings
from ..workflows.settings.select_knowledge import check_side
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, progress_bar, show_rows
from .verb import verb


@verb(SelectBehaviourSettings, renamed={"degree": "strength"}, writes="folder")
def select_behaviour(
    model: Model,
    prompts_a: Annotated[Path, typer.Argument(help="Prompts of behaviour A: a .txt with one a line, .jsonl, .csv.")],
    prompts_b: Annotated[Path, typer.Argument(help="Prompts of behaviour B.")],
    settings: SelectBehaviourSettings,
    sae: Saes = None,
    out: Annotated[Path, typer.Option(help="Folder of the features and the steering.")] = Path("outputs/behaviour"),
    text_column: Annotated[str, typer.Option(help="Column of the prompts.")] = "text",
    save_model: Annotated[str | None, typer.Option(help="a or b: also save a model steered so by default.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Find what tells two groups of prompts apart, and steer a model to behave as after one of them."""
    check_side(save_model, SIDES)
    from ..workflows.loading import load
    from ..workflows.steering.select_behaviour import read_prompts
    from ..workflows.steering.select_behaviour import select_behaviour as select

    a, b = read_prompts(prompts_a, text_column), read_prompts(prompts_b, text_column)
    loaded, tokenizer, _ = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    with progress_bar("answers") as progress:
        result = select(loaded, tokenizer, a, b, settings, progress=progress)
    result.save(out, model=save_model)
    console = open_console()
    show_rows(console, result.rows(), title="what tells A from B; AUROC on held-out prompts")
    if result.prompts:
        rows = [{**row, "prompt": row["prompt"][-60:]} for row in result.answer_rows()]
        show_rows(console, rows, title="answers to held-out prompts")
    console.print(f"steering in {out}/towards-*.json")
