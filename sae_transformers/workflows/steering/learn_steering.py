"""Learn a sparse steering vector over chosen features from answers to prompts, through the frozen model."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...evaluation.journal import quick_fingerprint
from ...evaluation.results import versions
from ...latents.context import reading_length
from ...latents.output_files import locked_folder
from ...latents.text_latents import sae_of
from ...modeling import SaeForCausalLM, Steering
from ...training.steering.code_training import AnswerRow, Measured, base_loss, measured, train_code
from ...training.steering.learnt_code import LearntCode, frozen
from ...training.steering.settings import LearnSteeringSettings
from ..going_on import rows_sha256
from ..results import Progress, Result, save_json

SIGNED = ("abs_topk", "topk-identity", "topk-tanh", "identity")  # whose latents may be negative
CHECKPOINTS, ABOUT = "checkpoints", "about.json"


@dataclass(frozen=True)
class LearntSteering(Result):
    """A steering that was learnt.

    Args:
        steering: a plain `Steering`: `model.steering = result.steering`, `generate(steering=...)`, `serve --steering`.
        measures: by rows (`train`, `report`) and steering (`unsteered`, `trained`, `kept`, which is what is left of
            the trained values after `keep`): loss, and with preferences the share of rows where the chosen answer has
            gained on the rejected one.
        history: of the training: step, loss, gradient's norm, learning rate.
        n_train, n_report, n_cut: rows, and answers that were cut.
        settings: how it was done.
        folder: of the checkpoints, which `save` deletes.
    """

    steering: Steering
    measures: dict[str, dict[str, Measured]]
    history: list[dict[str, float]] = field(repr=False)
    n_train: int
    n_report: int
    n_cut: int
    settings: LearnSteeringSettings = field(repr=False)
    folder: Path | None = field(repr=False, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """One for each part of the rows and each steering: rows, steering, loss, preferred."""
        return [
            {"rows": part, "steering": name, **one._asdict()}
            for part, measures in self.measures.items()
            for name, one in measures.items()
        ]

    def summary(self) -> list[str]:
        """What a user should know before the numbers."""
        features = {(edit.sae, edit.feature) for edit in self.steering.feature_edits}
        lines = [f"{len(features):,} features, learnt from {self.n_train:,} rows."]
        if self.n_cut:
            lines.append(f"{self.n_cut:,} answers were cut.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which is what report.json holds."""
        return {
            "steering": self.steering.to_dict(),
            "measures": self.rows(),
            "history": self.history,
            **{name: getattr(self, name) for name in ("n_train", "n_report", "n_cut")},
            "settings": dataclasses.asdict(self.settings),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write steering.json (a `Steering`) and report.json; the paths. Checkpoints go."""
        written = save_json(folder, {"steering.json": self.steering.to_dict(), "report.json": self.to_dict()})
        if self.folder is not None:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
            (self.folder / ABOUT).unlink(missing_ok=True)
        return written


def learn_steering(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    features: Sequence[int | str | tuple[int, int | str]],
    settings: LearnSteeringSettings | None = None,
    *,
    scope: Steering | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> LearntSteering:
    """Learn values of chosen latents from answers that are preferred ("YaPO",
    https://huggingface.co/papers/2601.08441) or given (as in https://huggingface.co/papers/2505.16188).

    Only the values are trained; the model and its SAEs are frozen and come back as they were. The steering that is
    saved is what was trained: the same compiled tables, filled with the same numbers.

    Args:
        rows: mappings with `prompt` and `chosen`, and for preferences `rejected`: texts. A prompt is what `generate`
            will get, a chat template included; answers are appended token by token.
        features: latents by number or name, or (number of the SAE, latent) pairs; a latent alone is of SAE 0.
        scope: a `Steering` without edits: positions, gate, excluded tokens. Answers count as generated tokens.
        folder: keeps checkpoints, so that the same call goes on where it was stopped. `save` deletes them.
        progress: called with the steps that are done, and how many there are.

    Returns:
        The steering, and what it does to the rows that were not trained on.

    Raises:
        TypeError: rows that are no mappings of texts, or a scope with edits.
        ValueError: no features, one that is named twice or is not there, rows that are missing a column or are too
            few, a form that does not fit the SAE, or a folder of another run.
    """
    settings = settings or LearnSteeringSettings()
    chosen = _features(model, features)
    _check(model, chosen, scope, settings)
    scope = (Steering() if scope is None else scope).with_tokenizer(tokenizer)
    length = reading_length(model, settings.max_length, 256)
    found, n_cut = _tokenized(tokenizer, rows, settings.loss == "preference", length)
    order = random.Random(settings.seed).sample(range(len(found)), len(found))
    n_report = round(settings.report_share * len(found))
    if not 0 <= n_report < len(found) or (settings.report_share > 0 and not n_report):
        raise ValueError(
            f"Expected rows to train on and rows to report on. Received: {len(found)} rows, "
            f"report_share={settings.report_share!r}."
        )
    parts = {"train": [found[i] for i in order[n_report:]], "report": [found[i] for i in order[:n_report]]}
    path = None if folder is None else Path(folder)
    with locked_folder(path), frozen(model):
        if path is not None:
            about = {
                "model": [quick_fingerprint(model), str(model.dtype)],
                "features": chosen,
                "scope": scope.to_dict(),
                "settings": dataclasses.asdict(settings),
                "rows": rows_sha256([json.dumps(row) for row in found]),
                "versions": versions(),
            }
            _same_run(path, about)
        torch.manual_seed(settings.seed)
        code = LearntCode(model, chosen, settings.form, settings.unit, scope)
        checkpoints = None if path is None else path / CHECKPOINTS
        history = train_code(code, parts["train"], settings, folder=checkpoints, progress=progress)
        told = {name: part for name, part in parts.items() if part}
        measures = {
            name: {
                "unsteered": Measured(base_loss(code, part, settings), None),
                "trained": measured(code, part, settings),
            }
            for name, part in told.items()
        }
        if settings.keep is not None:
            code.keep(settings.keep)
            for name, part in told.items():
                measures[name]["kept"] = measured(code, part, settings)
        steering = code.steering()
    return LearntSteering(
        steering, measures, history, len(parts["train"]), len(parts["report"]), n_cut, settings, path
    )


def _features(model: SaeForCausalLM, features: Sequence[Any]) -> list[tuple[int, int]]:
    if isinstance(features, str) or not isinstance(features, Sequence) or not features:
        raise ValueError(f"Expected a list of features to learn values of. Received: features={features!r}.")
    pairs = [one if isinstance(one, (tuple, list)) else (0, one) for one in features]
    found = [(sae, sae_of(model, sae).config.resolve_feature(feature)) for sae, feature in pairs]
    if len(set(found)) < len(found):
        twice = next(one for one in found if found.count(one) > 1)
        raise ValueError(f"A feature has one value. Received: (SAE, feature) {twice} more than once.")
    return found


def _check(
    model: SaeForCausalLM, features: Sequence[tuple[int, int]], scope: Any, settings: LearnSteeringSettings
) -> None:
    if scope is not None and (not getattr(scope, "is_steering", False) or scope.edits):
        raise TypeError(f"`scope` must be a Steering without edits. Received: {scope!r}.")
    for number in {sae for sae, _ in features} if settings.form == "code" else ():
        activation = model.saes[number].config.activation
        if activation in SIGNED:
            raise ValueError(
                f"The form 'code' keeps latents at 0 or above, and those of SAE {number} may be negative. Expected "
                f"form='direction'. Received: activation={activation!r}."
            )


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]], pairs: bool, length: int
) -> tuple[list[AnswerRow], int]:
    """Token ids of rows, and how many answers were cut."""
    names = ("prompt", "chosen", "rejected") if pairs else ("prompt", "chosen")
    found, n_cut = [], 0
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"Expected rows as mappings with {', '.join(names)}; of a DataFrame `to_dict('records')`. "
                f"Received: {type(row).__name__} as row {number}."
            )
        for name in names:
            if not isinstance(row.get(name), str):
                raise ValueError(f"Expected a text as `{name}` of row {number}. Received: {row.get(name)!r}.")
        ids = [tokenizer(row[name], add_special_tokens=name == "prompt")["input_ids"] for name in names]
        prompt, answers = ids[0], ids[1:]
        if not 0 < len(prompt) < length or not all(answers):
            raise ValueError(
                f"Expected a prompt of 1 to {length - 1} tokens and answers of a token or more. Received: "
                f"{', '.join(f'{name} {len(one)}' for name, one in zip(names, ids, strict=True))} in row {number}."
            )
        n_cut += sum(len(prompt) + len(answer) > length for answer in answers)
        found.append(AnswerRow(prompt, *(answer[: length - len(prompt)] for answer in answers)))
    return found, n_cut


def _same_run(folder: Path, about: dict[str, Any]) -> None:
    """Note what a run depends on, or see that a stopped one depended on the same."""
    about = json.loads(json.dumps(about, default=str))
    known = folder / ABOUT
    if known.is_file():
        before = json.loads(known.read_text(encoding="utf-8"))
        if other := sorted(name for name in about if before.get(name) != about[name]):
            raise ValueError(
                f"{str(folder)!r} holds the checkpoints of another run. Expected the same call, or another folder. "
                f"Received: other {', '.join(other)}."
            )
        return
    save_json(folder, {ABOUT: about})
