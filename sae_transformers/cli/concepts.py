"""The verb `concept-set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .annotate import open_client
from .errors import guarded
from .options import (
    BaseUrl,
    BatchSize,
    Cache,
    Concurrency,
    DryRun,
    KeyEnv,
    LLMModel,
    LocalModel,
    MaxAttempts,
    MaxCost,
    MaxTokensTotal,
    PriceIn,
    PriceOut,
    Seed,
    Timeout,
)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("concept-set")(concept_set)


def concept_set(
    concepts: Annotated[Path, typer.Argument(help="Concepts in words, one a line.")],
    out: Annotated[Path, typer.Option(help="Folder, in AxBench's layout.")],
    instructions: Annotated[
        Path | None, typer.Option(help="Instructions to answer, one a line. [default: the model makes them up]")
    ] = None,
    model: LLMModel = None,
    base_url: BaseUrl = None,
    local_model: LocalModel = None,
    positives: Annotated[int, typer.Option(help="Training answers with each concept.")] = 72,
    negatives: Annotated[int, typer.Option(help="Training answers without any, for all concepts.")] = 72,
    test: Annotated[int, typer.Option(help="Answers with and answers without each concept to evaluate on.")] = 36,
    hard_negatives: Annotated[int, typer.Option(help="Answers with a word of each concept in another meaning.")] = 8,
    steering: Annotated[int, typer.Option(help="Instructions kept to steer on.")] = 10,
    words: Annotated[int, typer.Option(help="Of an answer, at most.")] = 100,
    max_tokens: Annotated[int, typer.Option(help="Of an answer; more for models that think first.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 1.0,
    seed: Seed = 0,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = 8,
    max_tokens_total: MaxTokensTotal = None,
    max_cost: MaxCost = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_attempts: MaxAttempts = 6,
    timeout: Timeout = 120.0,
    cache: Cache = None,
    batch_size: BatchSize = 8,
    dry_run: DryRun = False,
) -> None:
    """Have a chat model write texts with and without concepts, to find features and to measure detectors by."""
    settings = dict(locals())
    guarded(_concept_set, settings)


def _concept_set(s: dict[str, Any], console: Any) -> None:
    from ..create_training_data.concept_making import (
        ConceptRecipe,
        ask_instructions,
        expected_requests,
        instructions_wanted,
        make_concept_sets,
    )
    from ..create_training_data.concept_sets import write_concept_sets

    names = (
        "positives",
        "negatives",
        "test",
        "hard_negatives",
        "steering",
        "words",
        "max_tokens",
        "temperature",
        "seed",
    )
    recipe = ConceptRecipe(**{name: s[name] for name in names})
    concepts = [line.strip() for line in s["concepts"].read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = instructions_wanted(recipe)
    with open_client({**s, "submit": False, "batch_file": None, "batch_results": None}) as client:
        if s["instructions"] is not None:
            asked = [line for line in s["instructions"].read_text(encoding="utf-8").splitlines() if line.strip()]
        elif s["dry_run"]:
            asked = [
                f"An instruction of about twelve words, which stands for number {n} of them." for n in range(wanted)
            ]
        else:
            asked = ask_instructions(client, wanted, recipe)
        requests = expected_requests(concepts, asked, client, recipe)
        console.print(f"{client.model}: {client.estimate(requests)}", markup=False)
        if s["dry_run"]:
            return
        made = make_concept_sets(concepts, asked, client, recipe)
    if made.failures:
        missing = ", ".join(f"{count:,} {reason}" for reason, count in made.failures.items())
        raise ValueError(
            f"Some answers are missing: {missing}. What was answered is kept: the same command asks for these only."
        )
    files = write_concept_sets(made.sets, s["out"])
    for one in made.sets:
        counts = {part: {k: len(v) for k, v in getattr(one, part).items()} for part in ("train", "test")}
        console.print(f"{one.concept[:60]}: {counts}", markup=False)
    console.print(" ".join(map(str, files)), markup=False)
