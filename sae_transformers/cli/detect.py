"""The verbs `detect` and `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..workflows.settings import DetectSettings
from .errors import guarded
from .options import ModelDtype, parse_feature
from .tables import progress_bar
from .verb import with_settings

Model = Annotated[str, typer.Argument(help="A model with SAEs, as attach or steer writes it, or a base.")]
Saes = Annotated[list[str] | None, typer.Option(help="An SAE for a base, as attach takes it. Repeatable.")]
HookPoint = Annotated[str | None, typer.Option(help="Where an SAE reads that does not say it itself.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(detect)
    app.command()(features)


PRE_ACTIVATIONS = typer.Option("--pre-activations/--activations", help="Score before the activation function.")


@with_settings(
    DetectSettings,
    renamed={"place": "hook_point"},
    own={"pre_activations": PRE_ACTIVATIONS},
)
def detect(
    model: Model,
    texts: Annotated[str, typer.Argument(help="Rows with a text: .csv, .jsonl, .parquet, .txt, a Hub id.")],
    feature: Annotated[str, typer.Option(help="A latent's number or a concept's name; SAE:latent for a later SAE.")],
    sae: Saes = None,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv: row, score, label.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the label, 0 or 1; rows need not have it.")] = "label",
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
    batch_size: Annotated[int | None, typer.Option(hidden=True)] = None,
    settings: Any = None,
) -> None:
    """Score texts by one feature; with labels, say how well it tells them apart."""
    guarded(_detect, dict(locals()))


def _detect(s: dict[str, Any], console: Any) -> None:
    settings = DetectSettings(**s["settings"])
    if s["batch_size"] is not None:
        console.print("--batch-size is now --tokens-per-batch, which counts tokens. It changes no score.")
    number, name = parse_feature(s["feature"])
    from ..latents.texts import LABEL_NAMES, column_of, open_text
    from ..workflows.detect import detect as detect_texts
    from ..workflows.loading import load

    rows = list(open_text(s["texts"]).rows())
    texts = [str(text) for text in column_of(rows, s["texts"], s["text_column"])]
    labels = [LABEL_NAMES.get(str(row.get(s["label_column"])).strip().lower()) for row in rows]
    model, tokenizer, _ = load(s["model"], s["sae"] or None, hook_point=s["hook_point"], model_dtype=s["model_dtype"])
    with progress_bar("texts") as progress:
        found = detect_texts(model, tokenizer, texts, name, labels, settings, sae=number, progress=progress)
    if s["out"] is not None:
        found.save(s["out"])
        console.print(f"{s['out']}", markup=False)
    scores = found.scores[~found.scores.isnan()]
    if not len(scores):
        raise ValueError(f"No text has a token after the first {settings.skip_first}. Try a smaller --skip-first.")
    console.print(
        f"{len(texts):,} texts, score {scores.mean():.4g} ± {scores.std():.4g}, above 0 in {int((scores > 0).sum()):,}"
    )
    if found.missing:
        console.print(f"{found.missing:,} texts have no token after the first {settings.skip_first}, so no score.")
    if found.cut:
        console.print(f"{found.cut:,} texts were cut at {found.settings.max_length} tokens (--max-length).")
    known = [label for label in labels if label is not None]
    if quality := found.quality():
        console.print(
            f"{sum(known):,} of {len(known):,} labelled texts have label 1: AUROC {quality['auroc']:.3f}, "
            f"F1 {quality['f1']:.3f} at {quality['threshold']:.4g} (threshold from half of them, F1 of the others; "
            f"F1 {quality['f1_always_yes']:.3f} if every text is called positive)"
        )
    elif known:
        console.print(f"No AUROC: the {len(known):,} labels are all {known[0]}.")


def features(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text itself.")],
    sae: Saes = None,
    number: Annotated[int, typer.Option(help="Which of the model's SAEs, from 0.")] = 0,
    k: Annotated[int, typer.Option("--k", help="Features shown.")] = 10,
    per_token: Annotated[bool, typer.Option("--per-token", help="The strongest of each token.")] = False,
    skip_first: Annotated[int, typer.Option(help="Leading tokens that are not read.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Table to write, .csv: every token's features.")] = None,
    hook_point: HookPoint = None,
    model_dtype: ModelDtype = "auto",
) -> None:
    """Show which features a text has: the strongest of each token, with names where they are known."""
    guarded(_features, dict(locals()))


def _features(s: dict[str, Any], console: Any) -> None:
    from ..workflows.loading import load
    from ..workflows.top_features import top_features
    from .tables import show_rows

    model, tokenizer, _ = load(s["model"], s["sae"] or None, hook_point=s["hook_point"], model_dtype=s["model_dtype"])
    found = top_features(model, tokenizer, s["text"], s["k"], sae=s["number"], skip_first=s["skip_first"])
    if s["out"] is not None:
        found.save(s["out"])
        console.print(f"{s['out']}", markup=False)
    rows = found.rows() if s["per_token"] else found.strongest(s["k"])
    if not rows:
        console.print("No feature is active.")
        return
    show_rows(console, rows, title=f"{len(found.tokens)} tokens, SAE {found.sae}")
