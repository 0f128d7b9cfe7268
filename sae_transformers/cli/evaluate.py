"""The verb `evaluate`: suites of measurements, one after the other, into one results.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..workflows.settings.evaluate import SUITES, EvaluateSettings, evaluate_options
from ..workflows.settings.generate import parse_feature
from .options import HookPoint, Model, ModelDtype, Saes
from .tables import open_console, show_suite, suite_bars
from .verb import recorded_command, verb

if TYPE_CHECKING:
    from ..workflows.evaluate import SuiteResult

RENAMED = {"plain": "no_chat", "generation_seeds": "samples_per_prompt", "rows_at_once": "generation_batch_size"}
QUIET = ("again", "out", "plots", "api_key_env", "cache")  # options that change no number


def with_registered_suites() -> Callable[..., None]:
    """The verb, with the options of the suites that are registered by now."""

    @verb(evaluate_options(), renamed=RENAMED, writes="folder")
    def evaluate(
        model: Model,
        settings: Any,
        suite: Annotated[
            str | None, typer.Option(help=f"Comma-separated, of {', '.join(SUITES)}. [default: whose data is given]")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder of results.json; an interrupted run goes on.")] = Path(
            "outputs/evaluation"
        ),
        again: Annotated[
            bool,
            typer.Option("--again", help="Measure suites again that are in the record, or replace another model's."),
        ] = False,
        sae: Saes = None,
        hook_point: HookPoint = None,
        base: Annotated[str | None, typer.Option(help="In place of the base that a published model names.")] = None,
        revision: Annotated[str | None, typer.Option(help="Revision of the model on the Hub.")] = None,
        model_dtype: ModelDtype = "auto",
        steering: Annotated[
            str | None,
            typer.Option(help="JSON, a file of it or its name in the model's folder. [default: the model's own]"),
        ] = None,
        feature: Annotated[
            list[str] | None,
            typer.Option(help="9, 1:9 (of SAE 1) or a name in the SAE. Repeatable. [default: the SAEs' concepts]"),
        ] = None,
        plots: Annotated[bool, typer.Option("--plots", help="Pictures beside the record.")] = False,
    ) -> None:
        """Measure a model with SAEs: what they keep, detect and steer, and what it costs; into one JSON file."""
        features = [parse_feature(text) for text in feature] if feature else None
        from ..workflows.evaluate import evaluate as measure
        from ..workflows.evaluate import read_suites, steer_by_default
        from ..workflows.loading import load, read_steering

        names = None if suite is None else [name.strip() for name in suite.split(",") if name.strip()]
        suites = read_suites(settings, names, features, feature)
        default = None if steering is None else read_steering(steering, model)
        loaded, tokenizer, _ = load(
            model, sae or None, hook_point=hook_point, base=base, model_dtype=model_dtype, revision=revision
        )
        steer_by_default(loaded, default and default.with_tokenizer(tokenizer), features, settings.reading.max_length)
        console = open_console()
        run = EvaluateSettings(again, model, revision, recorded_command(QUIET))
        path = out / "results.json"

        def show(result: SuiteResult, there: bool) -> None:
            if there:
                console.print(f"{result.name}: in {path} already (--again measures it anew)")
            picture = out / f"{result.name}.png" if plots else None
            show_suite(console, result, SUITES[result.name], picture)

        with suite_bars() as progress:
            measure(loaded, tokenizer, suites, out, run, progress=progress, finished=show, notice=console.print)
        console.print(f"{path}")

    return evaluate


evaluate = with_registered_suites()
