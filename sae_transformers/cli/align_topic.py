"""The verb `align-topic`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.align_topic import TopicOptions
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, progress_bar, show_lines, show_rows
from .verb import verb

OWN = {
    "keep_error": typer.Option(
        "--keep-error/--replace",
        help="Keep what the SAE does not reconstruct, or, as in the paper, replace the hidden state.",
        rich_help_panel="Method",
    ),
    "all_positions": typer.Option("--all-positions", help="Steer the first token too.", rich_help_panel="Method"),
}


@verb(TopicOptions, own=OWN, leave_out=("chat", "samples_per_prompt", "journal"), writes="folder")
def align_topic(
    model: Model,
    reference: Annotated[str, typer.Option(help="Texts of all kinds: .csv, .jsonl, .parquet, .txt, a Hub id.")],
    topic: Annotated[str, typer.Option(help="Texts of the topic.")],
    settings: TopicOptions,
    sae: Saes = None,
    number: Annotated[int, typer.Option(help="Which of the model's SAEs, from 0.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of scores, steering and report.")] = Path("outputs/topic"),
    scores: Annotated[Path | None, typer.Option(help="A saved table of scores, in place of new ones.")] = None,
    save_model: Annotated[bool, typer.Option("--save-model", help="Save the model, steered by default.")] = False,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Steer towards the topic of some texts, and say how far to trust it."""
    from ..workflows.loading import load
    from ..workflows.steering.align_topic import TopicTexts, read_topic_scores
    from ..workflows.steering.align_topic import align_topic as align

    texts = TopicTexts(**settings.files.read(reference, topic))
    table = None if scores is None else read_topic_scores(scores)
    console = open_console()
    embedder = settings.settings.embedding.load(console.print)
    loaded, tokenizer, base = load(model, sae or None, hook_point=hook_point, model_dtype=model_dtype)
    plan = replace(settings.settings, journal=out / "topic.partial.jsonl")
    with progress_bar("texts") as progress:
        found = align(
            loaded, tokenizer, texts, plan, sae=number, scores=table, embedder=embedder, progress=progress
        )  # fmt: skip
    show_lines(console, found.summary())
    if found.methods:
        show_rows(console, found.table(), title=f"{len(found.samples)} continuations: mean ± standard error")
    if found.methods and settings.files.prompts is not None:
        show_rows(console, found.continuations())
    facts = {
        "model": model, "base": base, "model_dtype": model_dtype, "place": hook_point, "number": number,
        "sae": sae[0] if sae and len(sae) == 1 else sae, "scores": scores and str(scores), "reference": reference,
        "topic": topic, **vars(settings.files), "out": str(out), "save_model": save_model,
    }  # fmt: skip
    console.print(", ".join(map(str, found.save(out, facts))))
    if save_model:
        loaded.steering = found.steering
        loaded.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        console.print(f"AutoModelForCausalLM.from_pretrained({str(out / 'model')!r}, trust_remote_code=True)")
