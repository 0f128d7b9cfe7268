"""Find what tells two groups of prompts apart, and steer a model to behave as after one of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ...evaluation.detection.metrics import auroc
from ...evaluation.generation.short_answers import short_answers
from ...latents.sparse_codes import SparseCodes, encode_texts
from ...latents.text_input import text_source
from ...latents.texts import open_text, read_column
from ...modeling import SaeForCausalLM, Steering
from ...training.steering.functional_features import (
    FunctionalFeatures,
    functional_features,
    functional_steering,
    select_features,
)
from ..results import Progress, Result, html_table, to_frame
from ..settings.select_behaviour import SIDES, SelectBehaviourSettings
from ..settings.select_knowledge import check_side
from .functional import last_states, save_steered_model, save_steerings, with_activation

if TYPE_CHECKING:
    from pandas import DataFrame

LEAST = 4  # prompts of a behaviour


@dataclass(frozen=True)
class SelectBehaviourResult(Result):
    """The steering towards both behaviours, and how well its features tell them apart.

    Args:
        steering: `a` and `b` -> the steering towards that behaviour.
        features: of each SAE, what each latent has to do with both behaviours.
        selected: of each SAE, the latents of A and of B that are edited, the most informative first.
        auroc: of each SAE, how well these tell held-out prompts of A from those of B; None without held-out prompts.
        prompts: held-out prompts that were answered.
        answers: `unsteered`, `towards A`, `towards B` -> an answer to each of these.
        model: with the SAEs that `steering` is for. tokenizer: of it.
        settings: how it was done.
    """

    steering: dict[str, Steering] = field(repr=False)
    features: list[FunctionalFeatures] = field(repr=False)
    selected: list[tuple[list[int], list[int]]] = field(repr=False)
    auroc: list[float | None]
    prompts: list[str] = field(repr=False)
    answers: dict[str, list[str]] = field(repr=False)
    model: SaeForCausalLM = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    settings: SelectBehaviourSettings

    def rows(self) -> list[dict[str, Any]]:
        """One for each SAE: its number, how many features of A and of B are edited, AUROC on held-out prompts."""
        return [
            {"sae": number, "features_a": len(a), "features_b": len(b), "auroc": score}
            for number, ((a, b), score) in enumerate(zip(self.selected, self.auroc, strict=True))
        ]

    def answer_rows(self) -> list[dict[str, str]]:
        """One for each held-out prompt that was answered: the prompt, and the answers."""
        return [
            {"prompt": prompt, **{name: texts[i] for name, texts in self.answers.items()}}
            for i, prompt in enumerate(self.prompts)
        ]

    def to_frame(self) -> DataFrame:
        """`answer_rows()` as a pandas DataFrame."""
        return to_frame(self.answer_rows())

    def to_dict(self) -> dict[str, Any]:
        """As JSON: features, AUROC, answers, settings."""
        selected = [{"a": a, "b": b} for a, b in self.selected]
        return {
            "saes": [{**row, **latents} for row, latents in zip(self.rows(), selected, strict=True)],
            "answers": self.answer_rows(),
            "settings": dataclasses.asdict(self.settings),
        }

    def save(self, folder: str | Path, *, model: str | None = None) -> None:
        """Write `towards-a.json`, `towards-b.json` and `features-N.safetensors` of each SAE.

        Args:
            folder: made where it is not there.
            model: `a` or `b`: also write `model/`, a model that is steered so by default.

        Raises:
            ValueError: no such side.
        """
        check_side(model, SIDES, "model")
        save_steerings(folder, self.features, self.steering)
        if model is not None:
            save_steered_model(Path(folder) / "model", self.model, self.tokenizer, self.steering[model])

    def _repr_html_(self) -> str:
        return html_table(self.rows()) + html_table(self.answer_rows())


def select_behaviour(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts_a: Any,
    prompts_b: Any,
    settings: SelectBehaviourSettings | None = None,
    *,
    text_column: str = "text",
    progress: Progress | None = None,
) -> SelectBehaviourResult:
    """Learn from most prompts which features tell the behaviours apart, and measure that on the others.

    Args:
        model: with an SAE, or several at different layers.
        prompts_a, prompts_b: of each behaviour: a list, a `Dataset`, a DataFrame, a path: see `text_input.TEXTS`.
        text_column: of the prompts, where rows have columns.
        progress: called with (held-out prompts answered, answers in all).

    Raises:
        ValueError: too few prompts, one that is too long, or nothing tells the behaviours apart.
    """
    settings = settings or SelectBehaviourSettings()
    groups = [
        shuffled(read_prompts(prompts, text_column, name=name), settings.seed)
        for name, prompts in (("prompts_a", prompts_a), ("prompts_b", prompts_b))
    ]
    model = with_activation(model, settings.activation)
    fits = [max(2, round(len(texts) * (1 - settings.held_out))) for texts in groups]
    states = [last_states(model, tokenizer, texts, tokens_per_batch=settings.tokens_per_batch) for texts in groups]
    layers, scores = [], []
    for number, sae in enumerate(model.saes):
        codes = [encode_texts(sae, of_group[number]) for of_group in states]
        fitted = [of_group.take_rows(torch.arange(n)) for of_group, n in zip(codes, fits, strict=True)]
        features = functional_features(*fitted, seed=settings.seed)
        proportion = 0.1 if settings.count is None and settings.proportion is None else settings.proportion
        a, b = select_features(features, proportion=proportion, count=settings.count)
        layers.append((number, features, a, b))
        rest = [of_group.take_rows(torch.arange(n, of_group.n_rows)) for of_group, n in zip(codes, fits, strict=True)]
        scores.append(_held_out_auroc(rest, a, b))
    steering = {
        side: functional_steering(layers, towards=i, degree=settings.strength, positions=settings.positions)
        for i, side in enumerate(SIDES)
    }
    shown = [text for texts, n in zip(groups, fits, strict=True) for text in texts[n : n + settings.samples]]
    return SelectBehaviourResult(
        steering,
        [features for _, features, _, _ in layers],
        [(a.tolist(), b.tolist()) for _, _, a, b in layers],
        scores,
        shown,
        _answers(model, tokenizer, shown, steering, settings, progress) if shown else {},
        model,
        tokenizer,
        settings,
    )


def read_prompts(source: Any, text_column: str = "text", *, name: str | None = None) -> list[str]:
    """Prompts with a word: of a .txt file one in each line, else as `text_input.TEXTS` says.

    Args:
        source: a path (a string is one text), or texts.
        text_column: of the prompts, where rows have columns.
        name: what an error calls the source.

    Raises:
        ValueError: fewer than four prompts, or no such column.
        OSError: there is no such file.
    """
    if isinstance(source, Path):
        lines = open_text(str(source), txt_rows="line").rows() if source.suffix == ".txt" else None
        texts = (
            [str(row["text"]) for row in lines] if lines else read_column(str(source), text_column, keep_empty=True)
        )
    else:
        blocks = text_source(source, text_column=text_column).blocks(1024, itertools.count())
        texts = [text for _, rows in blocks for text in rows.texts]
    texts = [text for text in texts if text.strip()]
    if len(texts) < LEAST:
        place = repr(str(source)) if isinstance(source, Path) else f"`{name or 'source'}`"
        raise ValueError(f"Each behaviour needs four prompts or more. Received: {len(texts)} in {place}.")
    return texts


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The texts in an order of the seed's."""
    order: list[int] = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[i] for i in order]


def _held_out_auroc(codes: Sequence[SparseCodes], a: torch.Tensor, b: torch.Tensor) -> float | None:
    """How well the sum of A's latents less that of B's tells rows of A from rows of B."""
    if not all(of_group.n_rows for of_group in codes):
        return None
    scores = torch.cat([of_group.columns(a).sum(1) - of_group.columns(b).sum(1) for of_group in codes])
    labels = torch.tensor([1] * codes[0].n_rows + [0] * codes[1].n_rows)
    return float(auroc(scores, labels))


def _answers(
    model: SaeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    steering: dict[str, Steering],
    settings: SelectBehaviourSettings,
    progress: Progress | None,
) -> dict[str, list[str]]:
    """Answers unsteered and towards each side."""
    runs: dict[str, Steering | Literal[False]] = {"unsteered": False}
    runs |= {f"towards {side.upper()}": steering[side] for side in SIDES}
    answers = {}
    for number, (name, edits) in enumerate(runs.items()):
        before, total = number * len(prompts), len(runs) * len(prompts)
        answers[name] = short_answers(
            model,
            tokenizer,
            prompts,
            steering=edits,
            max_new_tokens=settings.max_new_tokens,
            tokens_at_once=settings.tokens_per_batch,
            progress=progress and (lambda done, _, before=before, total=total: progress(before + done, total)),
        )
    return answers
