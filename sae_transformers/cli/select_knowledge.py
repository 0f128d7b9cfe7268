"""The verb `select-knowledge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.select_knowledge import SelectKnowledgeSettings, check_side, knowledge_config
from .errors import fail
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, progress_bar, show_lines, show_rows
from .verb import verb


def _defaults(context: typer.Context, config: str | None) -> None:
    try:
        context.default_map = None if config is None else knowledge_config(config)
    except (ValueError, OSError) as error:
        fail(error, code=2)


CONFIG = "Defaults of a published model: spare-llama-2-7b, spare-llama-3-8b, spare-gemma-2-9b-context or -memory."


@verb(SelectKnowledgeSettings, renamed={"proportion": "proportions", "degree": "strengths"}, writes="folder")
def select_knowledge(
    model: Model,
    settings: SelectKnowledgeSettings,
    questions: Annotated[
        str | None, typer.Argument(help="Rows as NQ-Swap has. Without: a selection from --features, with no model.")
    ] = None,
    sae: Saes = None,
    config: Annotated[str | None, typer.Option(help=CONFIG, is_eager=True, callback=_defaults)] = None,
    out: Annotated[Path, typer.Option(help="Folder of results and steering.")] = Path("outputs/knowledge"),
    save_model: Annotated[str | None, typer.Option(help="A side: also save a model that is steered so.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Make a model answer from its context, or from what it remembers, where the two differ (SpARE)."""
    check_side(save_model, settings.sides, without=None if questions else "questions")
    from ..workflows.steering.select_knowledge import read_conflicts, select_published_knowledge
    from ..workflows.steering.select_knowledge import select_knowledge as select

    console = open_console()
    if questions is None:
        published = select_published_knowledge(settings)
        published.save(out)
        show_lines(console, published.summary())
        show_rows(console, published.table(), title=f"{out}")
        return
    from ..workflows.loading import load

    rows, facts = read_conflicts(questions), {"model": model, "sae": sae or []}
    loaded, tokenizer, facts["model"] = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    with progress_bar("prompts") as progress:
        result = select(
            loaded, tokenizer, rows, settings, out=out, facts=facts, progress=progress, notice=console.print
        )
    result.save(out, model=save_model)
    runs = f"{len(settings.questions.seeds)} choices of demonstrations: mean ± 95 % interval"
    show_rows(console, result.table(), title=f"{result.facts['test']} questions, {runs}")
    console.print(f"{out / 'results.json'}, steering in {out}/towards-*.json")
