"""The verb `select-knowledge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.select_knowledge import SIDES, SelectKnowledgeSettings, check_side
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, progress_bar, show_rows
from .verb import verb


@verb(SelectKnowledgeSettings, renamed={"proportion": "proportions", "degree": "strengths"})
def select_knowledge(
    model: Model,
    questions: Annotated[
        str, typer.Argument(help="Rows of question, org_context, org_answer, sub_context, sub_answer, as NQ-Swap has.")
    ],
    settings: SelectKnowledgeSettings,
    sae: Saes = None,
    out: Annotated[Path, typer.Option(help="Folder of results and steering.")] = Path("outputs/knowledge"),
    save_model: Annotated[
        str | None, typer.Option(help="context or memory: also save a model that is steered so by default.")
    ] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Make a model answer from its context, or from what it remembers, where the two differ (SpARE)."""
    check_side(save_model, SIDES)
    from ..workflows.loading import load
    from ..workflows.steering.select_knowledge import read_conflicts
    from ..workflows.steering.select_knowledge import select_knowledge as select

    rows = read_conflicts(questions)
    loaded, tokenizer, name = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    facts, console = {"model": name, "sae": sae or []}, open_console()
    with progress_bar("prompts") as progress:
        result = select(
            loaded, tokenizer, rows, settings, out=out, facts=facts, progress=progress, notice=console.print
        )
    result.save(out, model=save_model)
    runs = f"{len(settings.questions.seeds)} choices of demonstrations: mean ± 95 % interval"
    show_rows(console, result.table(), title=f"{result.facts['test']} questions, {runs}")
    console.print(f"{out / 'results.json'}, steering in {out}/towards-*.json")
