"""The verb `evaluate`: suites of measurements, one after the other, into one results.json."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import guarded
from .options import Cache, KeyEnv, LabelColumn, MaxLength, ModelDtype, Place, Seed, TextColumn, asking

if TYPE_CHECKING:
    from ..evaluation.journal import Journal
    from ..evaluation.results import Results
    from .evaluate_suites import Prepared

SUITES = ("reconstruction", "detection", "steering", "fairness", "capability", "speed")
RECORD = "results.json"
_reconstruction = partial(typer.Option, rich_help_panel="Suite reconstruction")
_labelled = partial(typer.Option, rich_help_panel="Suites detection and steering")
_detection = partial(typer.Option, rich_help_panel="Suite detection")
_steering = partial(typer.Option, rich_help_panel="Suite steering")
_fairness = partial(typer.Option, rich_help_panel="Suite fairness")
_fairness_capability = partial(typer.Option, rich_help_panel="Suites fairness and capability")
_capability = partial(typer.Option, rich_help_panel="Suite capability")
_speed = partial(typer.Option, rich_help_panel="Suite speed")
QUIET = ("again", "out", "plots", "api_key_env", "cache")  # options that change no number


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="A published model with SAEs, a folder or a Hub id; or a base, --sae.")],
    suite: Annotated[
        str | None, typer.Option(help=f"Comma-separated, of {', '.join(SUITES)}. [default: whose data is given]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.json; an interrupted run goes on.")] = Path(
        "outputs/evaluation"
    ),
    again: Annotated[bool, typer.Option("--again", help="Also suites that are there, or another model.")] = False,
    sae: Annotated[list[str] | None, typer.Option(help="An SAE for a base, as attach takes it. Repeatable.")] = None,
    place: Place = None,
    base: Annotated[str | None, typer.Option(help="In place of the base that a published model names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    model_dtype: ModelDtype = "auto",
    steering: Annotated[
        Path | None, typer.Option(help="JSON, such as steering.json of steer, in place of the model's default.")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="9, 1:9 (of SAE 1) or a name in the SAE. Repeatable. [default: the SAEs' concepts]"),
    ] = None,
    texts: Annotated[str | None, _reconstruction(help="Texts the SAE was not trained on.")] = None,
    max_texts: Annotated[int, _reconstruction(help="Of --texts; the first ones.")] = 500,
    txt_rows: Annotated[str, _reconstruction(help="A row of a .txt file: paragraph, line or file.")] = "paragraph",
    labelled: Annotated[str | None, _labelled(help="Rows with a text and a label, 1 where the concept is.")] = None,
    max_labelled: Annotated[int, _labelled(help="Of each label, drawn by --seed.")] = 500,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    seeds: Annotated[str, _detection(help="Of the splits, comma-separated.")] = "0,1,2",
    ks: Annotated[str, _detection(help="Latents of the k-sparse probes.")] = "1,2,5,16",
    choose_by: Annotated[str, _detection(help="Their choice, mean_difference or auroc.")] = "mean_difference",
    trees: Annotated[bool, _detection("--trees/--no-trees", help="SCAR's decision trees.")] = True,
    prompts: Annotated[Path | None, _steering(help="One a line; half choose, half report.")] = None,
    scorer: Annotated[
        str | None,
        _steering(
            help="sentiment, profanity, words (fitted to half of --labelled), classifier:ID#LABEL, "
            "judge:CONCEPT, perspective. [default: words with --labelled, else sentiment]"
        ),
    ] = None,
    judge_model: Annotated[str | None, asking(help="Of judge:CONCEPT, a model's name at the server.")] = None,
    judge_url: Annotated[str | None, asking(help="Its server, with OpenAI's interface.")] = None,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    cache: Cache = None,
    more: Annotated[str, _steering(help="An instruction for the concept, to compare with.")] = "",
    less: Annotated[str, _steering(help="An instruction against it.")] = "",
    goals: Annotated[str, _steering(help="raise, lower or both.")] = "raise,lower",
    op: Annotated[str, _steering(help="What is done to the feature, as steer takes it.")] = "direction",
    strengths: Annotated[str | None, _steering(help="Comma-separated, in hidden norms.")] = None,
    chat: Annotated[bool, _steering("--chat/--plain", help="Prompts in the chat template.")] = False,
    generation_seeds: Annotated[int, _steering(help="Continuations of a prompt, each of a seed.")] = 1,
    perplexity_limit: Annotated[float, _steering(help="Times the unsteered perplexity.")] = 1.6,
    repetition_limit: Annotated[
        float | None, _steering(help="Repeated trigrams that may be added. [default: any]")
    ] = None,
    new_tokens: Annotated[int, _steering(help="Of a continuation.")] = 40,
    temperature: Annotated[float, _steering(help="0 is greedy.")] = 0.7,
    samples: Annotated[int, _steering(help="Prompts whose continuations are kept as texts.")] = 0,
    rows_at_once: Annotated[int, _steering(help="Continuations made together.")] = 32,
    winobias: Annotated[Path | None, _fairness(help="Folder of {pro,anti}_stereotyped_type{1,2}_test.txt.")] = None,
    crows_pairs: Annotated[Path | None, _fairness(help="CrowS-Pairs' csv file.")] = None,
    max_pairs: Annotated[int | None, _fairness(help="Of each set of pairs; the first ones.")] = None,
    lambada: Annotated[Path | None, _fairness_capability(help=".jsonl with a column text.")] = None,
    original: Annotated[str | None, _fairness(help="Texts, ...")] = None,
    swapped: Annotated[str | None, _fairness(help="... and the same with an attribute swapped.")] = None,
    max_swapped: Annotated[int, _fairness(help="Of these pairs; the first ones.")] = 500,
    swapped_column: Annotated[str, _fairness(help="Of both.")] = "text",
    mmlu: Annotated[Path | None, _capability(help="MMLU's archive or folder.")] = None,
    subjects: Annotated[str | None, _capability(help="Of MMLU, comma-separated. [default: all]")] = None,
    shots: Annotated[int, _capability(help="Of MMLU.")] = 5,
    limit: Annotated[int | None, _capability(help="Rows of LAMBADA and of each subject; the first ones.")] = None,
    batch_size: Annotated[int, _capability(help="Rows of a forward pass.")] = 8,
    prompt_tokens: Annotated[int, _speed(help="Of a prompt.")] = 128,
    generated_tokens: Annotated[int, _speed(help="After it.")] = 16,
    repeats: Annotated[int, _speed(help="Of each call.")] = 5,
    max_length: MaxLength = 256,
    skip_first: Annotated[int, typer.Option(help="Tokens at the beginning of texts that do not count.")] = 1,
    tokens_at_once: Annotated[int, typer.Option(help="Of a forward pass.")] = 1024,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap that gives the 95 % intervals.")] = 1000,
    seed: Seed = 0,
    plots: Annotated[bool, typer.Option("--plots", help="Pictures beside the record.")] = False,
) -> None:
    """Measure a model with SAEs: what they keep, detect and steer, and what it costs; into one JSON file."""
    settings = dict(locals())
    guarded(_evaluate, settings)


def _evaluate(s: dict[str, Any], console: Any) -> None:
    from dataclasses import replace

    from tqdm import tqdm

    from ..evaluation.results import Results, read_results, versions, write_results
    from .evaluate_model import load_model, model_facts
    from .evaluate_show import draw_suite, show_suite
    from .evaluate_suites import chosen_suites, prepare

    names = chosen_suites(s, SUITES)
    prepared = {name: prepare(name, s) for name in names}  # what is missing or wrong is told before anything runs
    model, tokenizer = load_model(s)
    facts = model_facts(s, model)
    path = s["out"] / RECORD
    record = read_results(path) if path.is_file() else None
    if record is not None and record.model != facts and not s["again"]:
        raise ValueError(
            f"{path} is of another model, revision, steering or precision. Choose another --out, or start anew with "
            f"--again. Received: {_difference(record.model, facts)}."
        )
    if record is None or record.model != facts:
        record = Results(facts, "", _now(), versions=versions())
    record, done = _continued(record, prepared, versions(), again=s["again"])
    for name in names:
        if name in done:
            there = record.suites[name]
            console.print(f"{name}: in {path} already (--again measures it anew)", markup=False)
        else:
            journal = _journal(name, prepared[name], facts, path, console)
            with tqdm(desc=name, unit="") as bar:
                found = prepared[name].run(model, tokenizer, bar.update, journal)
            told = {"asked": prepared[name].asked, "command": _command(s)}
            there = replace(found, settings={**found.settings, **told}, data=[*prepared[name].data, *found.data])
            record = record.with_suite(there)
            commands = dict.fromkeys(one.settings.get("command", "") for one in record.suites.values())
            write_results(replace(record, command="\n".join(commands), created=_now()), path)
            journal.remove()
        show_suite(there, console)
        if s["plots"]:
            drawn = draw_suite(there, s["out"])
            missing = "No plot: matplotlib is not installed (sae-transformers[plots])."
            console.print(f"{drawn}" if drawn else missing, markup=False)
    console.print(f"{path}", markup=False)


def _journal(suite: str, prepared: Prepared, facts: Mapping[str, Any], path: Path, console: Any) -> Journal:
    """Of the parts of a suite, beside the record until that has it."""
    from dataclasses import asdict

    from ..evaluation.journal import Journal
    from ..evaluation.results import versions

    about = [facts, prepared.asked, [asdict(one) for one in prepared.data], dict(versions())]
    journal = Journal(path.with_name(f"{path.stem}.{suite}.partial.jsonl"), about)
    if journal.found:
        console.print(f"{suite}: goes on after {journal.found} parts of {journal.path}", markup=False)
    return journal


def _continued(
    record: Results, prepared: Mapping[str, Prepared], installed: Mapping[str, str], *, again: bool
) -> tuple[Results, set[str]]:
    """The record to go on with, and the suites that need not be measured: same options, data and versions.

    What other versions measured, and is not measured anew, says so.
    """
    from dataclasses import replace

    if record.versions == installed:
        done = {
            name
            for name, one in record.suites.items()
            if name in prepared and not again and one.settings.get("asked") == prepared[name].asked
            and list(one.data)[: len(prepared[name].data)] == prepared[name].data
        }  # fmt: skip
        return record, done
    told = f"Measured with other versions: {dict(record.versions)}."
    kept = {name: one for name, one in record.suites.items() if name not in prepared}
    marked = {name: replace(one, notes=[*one.notes, told]) for name, one in kept.items()}
    return replace(record, suites=marked, versions=installed), set()


def _command(s: Mapping[str, Any]) -> str:
    """The command with every option that differs from its default; those that change no number are left out."""
    words = ["sae-transformers", "evaluate", str(s["model"])]
    for name, parameter in inspect.signature(evaluate).parameters.items():
        value = s[name]
        if name == "model" or name in QUIET or value == parameter.default or value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else {"chat": "--plain"}.get(name, f"--no-{name.replace('_', '-')}"))
        else:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [option, str(one)]
    return shlex.join(words)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"another {name}" for name in names)


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")
