"""Suites of measurements on a model with SAEs, one after the other, into one record that grows and is never half."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.journal import Journal, fingerprint, quick_fingerprint, remove_journal
from ..evaluation.results import Results, SuiteResult, read_results, versions, write_results
from ..evaluation.suites import SUITES, Suite, SuiteInputs, suite_of
from ..latents.context import check_length
from ..latents.output_files import writes_to
from ..latents.safe_texts import without_logins
from ..modeling import SaeForCausalLM, Steering
from ..modeling.steering import without_receipt
from .results import html_table, save_json, to_frame
from .settings.evaluate import EvaluateSettings

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..evaluation.features.interventions import Embed
    from ..evaluation.scorers.registry import Ask
    from .settings.llm import LLMSettings

RECORD = "results.json"
JUDGE_TOKENS = 64  # of an answer

SuiteProgress = Callable[[str, int, int | None], object]  # (suite, done, total where it is known)


@dataclass(frozen=True)
class EvaluateResult:
    """The record, and which of it this call measured.

    Args:
        record: every suite that is in it.
        measured: names of the suites that were measured now.
        found: names of those that were in the record, with the same options, data and versions.
        path: of results.json; None where nothing was written.
    """

    record: Results = field(repr=False)
    measured: tuple[str, ...]
    found: tuple[str, ...]
    path: Path | None = None

    def rows(self, suite: str) -> list[dict[str, Any]]:
        """A suite as it is shown: metric, method, value, interval, n and what it is compared with."""
        return suite_of(suite).rows(self.record.suites[suite])

    def to_frame(self) -> DataFrame:
        """Every measurement, as a pandas DataFrame."""
        names = ("metric", "method", "value", "low", "high", "n", "seeds", "data", "better", "note")
        return to_frame([
            {"suite": suite, **{name: getattr(one, name) for name in names}}
            for suite, result in self.record.suites.items() for one in result.measurements
        ])  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The record, as JSON has it."""
        return self.record.to_dict()

    @writes_to("folder")
    def save(self, folder: str | Path) -> Path:
        """Write results.json; suites that are there of the same model and are not in this record stay.

        Returns:
            its path.

        Raises:
            ValueError: what is there is of another model.
        """
        path, record = Path(folder) / RECORD, self.record
        if path.is_file():
            there = read_results(path)
            if there.model != record.model:
                raise _other_model(path, there, record.model)
            record = replace(record, suites={**there.suites, **record.suites})
        for suite, result in record.suites.items():
            if beside := suite_of(suite).beside(result):
                save_json(folder, beside)
        return write_results(record, path)

    def plot(self, suite: str, path: str | Path) -> Path | None:
        """A picture of a suite; None without matplotlib."""
        return suite_of(suite).plot(self.record.suites[suite], path)

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{name}</h4>{html_table(self.rows(name), 200)}" for name in self.record.suites)


@writes_to("out")
def evaluate(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[Suite],
    out: str | Path | None = None,
    settings: EvaluateSettings | None = None,
    *,
    progress: SuiteProgress | None = None,
    finished: Callable[[SuiteResult, bool], object] | None = None,
    notice: Callable[[str], object] | None = None,
) -> EvaluateResult:
    """Measure suites; with a folder, the same call goes on where it was interrupted.

    Args:
        model: in eval mode; its default steering is what steers.
        suites: with their data, such as `ReconstructionSuite(texts)`; see `evaluation.suites`.
        out: folder of results.json, which is written after each suite; without, nothing is.
        settings: what is measured anew, and what the record says of the model.
        progress: called with the suite's name, what is done of it, and of how much.
        finished: called with each suite, and whether it was in the record already.
        notice: told in a line where a suite goes on that was interrupted.

    Raises:
        ValueError: the record is of another model, or a suite refuses its data or the model.
        BlockingIOError: another run writes to `out`.
    """
    settings = settings or EvaluateSettings()
    facts = model_facts(model, settings)
    path = None if out is None else Path(out) / RECORD
    record = read_results(path) if path is not None and path.is_file() else None
    if record is not None and record.model != facts and not settings.again:
        raise _other_model(path, record, facts)
    if record is None or record.model != facts:
        record = Results(facts, "", _now(), versions=versions())
    asked = {suite.name: suite.identity(tokenizer) for suite in suites}
    record, there = _continued(record, suites, asked, again=settings.again)
    for suite in suites:
        name = suite.name
        if name in there and path is not None:
            remove_journal(_journal_path(path, name))  # killed between the record and this
        if name not in there:
            journal = None if path is None else _journal(suite, path, [facts, asked[name]], notice)
            found = _measured(suite, model, tokenizer, journal, progress)
            told = {"asked": asked[name], "command": settings.command}
            data = [*suite.files(), *found.data]
            record = record.with_suite(replace(found, settings={**found.settings, **told}, data=data))
            commands = dict.fromkeys(one.settings.get("command", "") for one in record.suites.values())
            record = replace(record, command="\n".join(commands), created=_now())
            if path is not None and journal is not None:
                write_results(record, path)
                journal.remove()
        if path is not None and (beside := suite.beside(record.suites[name])):
            save_json(path.parent, beside)
        if finished is not None:
            finished(record.suites[name], name in there)
    measured = tuple(suite.name for suite in suites if suite.name not in there)
    return EvaluateResult(record, measured, tuple(name for name in asked if name in there), path)


def read_suites(
    options: Any,
    names: Sequence[str] | None = None,
    features: Sequence[tuple[int, int | str]] | None = None,
    feature_texts: list[str] | None = None,
) -> list[Suite]:
    """Suites with their data, from the options of the verb.

    Args:
        options: an instance of what `evaluate_options` makes.
        names: of suites; by default all whose data is given.
        features: SAE, and latent or name of a concept; by default the concepts of the SAEs.
        feature_texts: the same as they were typed, for the record.

    Raises:
        ValueError: an unknown suite, one whose data was not given, or what a suite refuses.
        OSError: a file is not there.
    """
    llm: LLMSettings = options.language_model
    judge_url = None if llm.llm_url is None else without_logins(llm.llm_url)  # it goes into the record
    inputs = SuiteInputs(
        None if features is None else tuple(features), feature_texts, options.reading, options.bootstrap,
        lambda: _ask(llm), {"judge_model": llm.llm or llm.local_model, "judge_url": judge_url}, _embedder,
    )  # fmt: skip
    return [SUITES[name].read(getattr(options, name), inputs) for name in _chosen(options, names)]


def steer_by_default(
    model: SaeForCausalLM,
    steering: Steering | None = None,
    features: Sequence[tuple[int, int | str]] | None = None,
    max_length: int | None = None,
) -> None:
    """Give a model its default steering, and refuse features and a length that it does not have.

    Raises:
        ValueError: it does not have them, or cannot be steered so.
    """
    if max_length is not None:
        check_length(model, max_length)
    if steering is not None:
        model.prepare_steering(steering)
        model.steering = steering
    for sae, feature in features or ():
        if sae >= len(model.saes):
            raise ValueError(f"`feature`: the model has {len(model.saes)} SAEs, from 0. Received: '{sae}:{feature}'.")
        model.config.sae_configs[sae].resolve_feature(feature)


def model_facts(model: SaeForCausalLM, settings: EvaluateSettings) -> dict[str, Any]:
    """What the record says of the model: its name, base, precision, SAEs and default steering, as JSON."""
    config = model.config
    saes = [
        {
            "place": entry.read_at,
            "writes": entry.write_at,
            "d_in": entry.d_in,
            "d_sae": entry.d_sae,
            "activation": entry.activation,
            "k": entry.k,
            "concepts": dict(entry.concepts),
            "sha256": fingerprint(sae),
        }
        for entry, sae in zip(config.sae_configs, model.saes, strict=True)
    ]
    facts = {
        "name": settings.name or config.name_or_path or "",
        "revision": settings.revision,
        "base": config.base_model_name_or_path,
        "base_revision": config.base_model_revision,
        "base_type": config.get_text_config().model_type,
        "base_parameters": sum(parameter.numel() for parameter in model.lm.parameters()),
        "base_weights": quick_fingerprint(model.lm),
        "dtype": str(model.lm.dtype).removeprefix("torch."),
        "saes": saes,
        "steering": without_receipt(model.steering) if model.steering else None,
    }
    return json.loads(json.dumps(facts))


def _journal(suite: Suite, path: Path, about: list[Any], notice: Callable[[str], object] | None) -> Journal:
    """Of the suite's parts, beside the record until that has the suite."""
    about = [*about, [asdict(file) for file in suite.files()], dict(versions())]
    journal = Journal(_journal_path(path, suite.name), about)
    if journal.found and notice is not None:
        notice(f"{suite.name}: goes on after {journal.found} parts of {journal.path}")
    return journal


def _measured(
    suite: Suite,
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal | None,
    progress: SuiteProgress | None,
) -> SuiteResult:
    done, total = 0, suite.steps(model)

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(suite.name, done, total)

    return suite(model, tokenizer, report=report, journal=journal)


def _continued(
    record: Results, suites: Sequence[Suite], asked: Mapping[str, Any], *, again: bool
) -> tuple[Results, set[str]]:
    """The record to go on with, and the suites that need not be measured: same options, data and versions.

    What other versions measured, and is not measured anew, says so.
    """
    installed = versions()
    if record.versions == installed:
        there = {
            suite.name
            for suite in suites
            if not again and (one := record.suites.get(suite.name)) is not None
            and one.settings.get("asked") == asked[suite.name]
            and list(one.data)[: len(suite.files())] == suite.files()
        }  # fmt: skip
        return record, there
    note = f"Measured with other versions: {dict(record.versions)}."
    kept = {name: one for name, one in record.suites.items() if name not in asked}
    marked = {name: replace(one, notes=[*one.notes, note]) for name, one in kept.items()}
    return replace(record, suites=marked, versions=installed), set()


def _chosen(options: Any, names: Sequence[str] | None) -> list[str]:
    """Suites in the order in which they are registered."""
    given = {name: _given(getattr(options, name)) for name in SUITES}
    if names is None:
        return [
            name for name, suite in SUITES.items()
            if suite.unasked and (not suite.needs or given[name] & set(suite.needs))
        ]  # fmt: skip
    if not names or set(names) - set(SUITES):
        told = ",".join(names)
        raise ValueError(f"`suite` must be of {', '.join(SUITES)}, comma-separated. Received: {told!r}.")
    for name in names:
        needs = SUITES[name].needs
        if needs and not given[name] & set(needs):
            fields = " or ".join(f"`{field}`" for field in needs)
            raise ValueError(f"The suite {name!r} needs {fields}. Received: none.")
    return [name for name in SUITES if name in names]


def _given(options: Any) -> set[str]:
    """Fields that are not None, in settings within settings too."""
    found: set[str] = set()
    for one in dataclasses.fields(options):
        value = getattr(options, one.name)
        if dataclasses.is_dataclass(value):
            found |= _given(value)
        elif value is not None:
            found.add(one.name)
    return found


def _ask(llm: LLMSettings) -> Ask:
    """What sends a scorer's questions to a language model."""
    from ..create_training_data.llm.requests import ChatRequest

    client = llm.client()

    def ask(questions: Sequence[str]) -> list[str | None]:
        requests = [ChatRequest([{"role": "user", "content": text}], JUDGE_TOKENS) for text in questions]
        return [answer.text for answer in client.complete_many(requests, False)]

    return ask


def _embedder() -> Embed:
    """What embeds sentences: the default model of `sentence-transformers`."""
    from ..create_training_data.sentence_embeddings import SentenceEmbedder

    return SentenceEmbedder().embed


def _journal_path(path: Path, suite: str) -> Path:
    return path.with_name(f"{path.stem}.{suite}.partial.jsonl")


def _other_model(path: Path | None, record: Results, facts: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"{path} is of another model, revision, steering or precision. Choose another `out`, or start anew with "
        f"`again`. Received: {_difference(record.model, facts)}."
    )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"another {name}" for name in names)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
