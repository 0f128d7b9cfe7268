"""The verb `steer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..workflows.settings.steer import SteerSettings
from ..workflows.settings.texts import read_lines
from .options import HookPoint, LabelColumn, Model, ModelDtype, Saes, TextColumn
from .tables import open_console, progress_bar, show_lines, show_rows
from .verb import verb

if TYPE_CHECKING:
    from ..workflows.steering.steer import SteerResult

RENAMED = {"plain": "no_chat", "rows_at_once": "batch_size"}


@verb(SteerSettings, renamed=RENAMED, leave_out=("journal",), writes="folder")
def steer(
    model: Model,
    labelled: Annotated[
        str, typer.Argument(help="Texts with a label, 1 where the concept is: a table, or a folder of concept-set.")
    ],
    prompts: Annotated[Path, typer.Option(help="Prompts to steer on, one a line: half choose, half report.")],
    settings: SteerSettings,
    sae: Saes = None,
    out: Annotated[Path, typer.Option(help="Folder of steering.json, report.json, model/.")] = Path(
        "outputs/steering"
    ),
    concept: Annotated[int, typer.Option(help="Number of the concept in a folder of several.")] = 0,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Find features by labelled texts, choose operation and strength by generating, and save the steered model."""
    lines = read_lines(prompts)
    from ..workflows.loading import load
    from ..workflows.steering.steer import read_labelled
    from ..workflows.steering.steer import steer as search_steering

    texts, labels, name = read_labelled(labelled, text_column, label_column, concept)
    scoring = replace(settings.scoring, judge_concept=settings.scoring.judge_concept or name)
    settings = replace(settings, scoring=scoring, journal=out / "continuations.partial.jsonl")
    loaded, tokenizer, _ = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    console = open_console()
    with progress_bar("rows") as progress:
        result = search_steering(loaded, tokenizer, texts, labels, lines, settings, progress=progress)
    _show(result, console)
    stale = not result.steering and (out / "model").exists()
    console.print(", ".join(str(path) for path in result.save(out)[:2]))
    if result.steering:
        console.print(f"AutoModelForCausalLM.from_pretrained({str(out / 'model')!r}, trust_remote_code=True)")
        return
    old = "; the one there is of an earlier run" if stale else ""
    console.print(
        f"steering.json changes nothing, and no model was saved{old}. What may help: more features "
        f"(--top {2 * settings.search.top}), another --selection or --scorer, weaker --strengths, or a "
        f"--perplexity-ratio above {settings.budget.perplexity_ratio:g}; the table shows which of them.",
    )


def _show(result: SteerResult, console: Any) -> None:
    show_rows(console, result.candidates, title="candidates")
    show_lines(console, result.summary())
    show_rows(console, [_cells(row) for row in result.rows()], title="prompts that choose")
    if result.report is not None:
        show_rows(console, [_cells(row) for row in result.report_rows()], title="prompts that report")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of numbers as it is shown."""
    cells = {
        "steering": row["steering"] + (" (chosen)" if row.get("chosen") else ""),
        "score": f"{row['score']:.3f} ± {row['score_error']:.3f}",
        "perplexity": f"{row['perplexity']:.1f}",
        "repeated": f"{row['repetition']:.1%}",
    }
    return {**cells, "within budget": "yes" if row["within_budget"] else "no"} if "within_budget" in row else cells


@verb(writes="file")
def export_steering(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A file (gguf), or a new folder (baked_bias).")],
    steering: Annotated[str, typer.Option(help="JSON, a file of it, or the name of one in the model's folder.")],
    to: Annotated[str, typer.Option(help="gguf (llama.cpp's control vector) or baked_bias (a model).")] = "gguf",
    sae: Saes = None,
    hook_point: HookPoint = None,
) -> None:
    """Write a steering for llama.cpp, or into the biases of a plain checkpoint, where that is exact."""
    from ..workflows.steering.export.export_steering import export_by_name

    show_lines(open_console(), export_by_name(model, sae or (), steering, out, to, hook_point).summary())
