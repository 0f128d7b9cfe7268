"""The verbs `explain`, `judge` and `ask-features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..workflows.settings.annotation import ExplainSettings, JudgeSettings
from ..workflows.settings.ask_features import AskFeaturesSettings
from .options import Table
from .tables import open_console, progress_bar, show_asked
from .verb import verb

Out = Annotated[Path, typer.Option(help="Table to write, without ending: it becomes .tsv and .parquet.")]
RENAMED = {"first": "max_rows", "plain": "no_structured"}


@verb(ExplainSettings, renamed=RENAMED, writes="file")
def explain(features: Table, out: Out, settings: ExplainSettings) -> None:
    """Say what each feature stands for, from its spans, with a language model; and have that verified."""
    from ..workflows.reading.explain import explain as explain_features

    with progress_bar("answers") as progress:
        result = explain_features(features, settings, progress=progress, notice=open_console().print)
    show_asked(result, out)


@verb(JudgeSettings, renamed=RENAMED, writes="file")
def judge(
    features: Table,
    task: Annotated[str, typer.Option(help="toxicity, helpfulness, disease, or a YAML file.")],
    out: Out,
    settings: JudgeSettings,
) -> None:
    """Say of each explained feature whether a task intends it. The others are what a classifier should not use."""
    from ..workflows.reading.judge import judge as judge_features

    with progress_bar("answers") as progress:
        result = judge_features(features, task, settings, progress=progress, notice=open_console().print)
    show_asked(result, out)


@verb(AskFeaturesSettings, renamed={"at_once": "features_per_request", "first": "max_rows"}, writes="file")
def ask_features(
    features: Table,
    question: Annotated[str, typer.Option(help="Answered for each feature, e.g. 'Does it concern gender?'.")],
    out: Annotated[Path, typer.Option(help="The .csv file to write: feature, answer, reason, failure.")],
    settings: AskFeaturesSettings,
) -> None:
    """Ask a language model one question about each feature of a table, many features to a request."""
    from ..workflows.reading.ask_features import ask_features as ask_about

    with progress_bar("requests") as progress:
        found = ask_about(features, question, settings, progress=progress, notice=open_console().print)
    show_asked(found, out)
