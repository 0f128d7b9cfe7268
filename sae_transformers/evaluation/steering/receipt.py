"""What a steering does, measured once and kept in its file: effect and damage, with intervals for fresh prompts.

receipt = measure_receipt(model, tokenizer, steering, prompts, neutral, get_scorer("sentiment"))
Path("steering.json").write_text(receipt.signed(steering).to_json())
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...latents.context import context_length
from ...modeling import Steering
from ..fresh_intervals import Number, fresh_mean, fresh_perplexity, fresh_perplexity_ratio, fresh_ratio, fresh_share
from ..journal import UNWATCHED, Watch
from ..results import versions
from ..scorers.refusal import refusal_scorer
from ..scorers.registry import Scorer, checked_scores
from ..suites.settings import GOALS, ReceiptSettings
from .dose import Dose, measure_dose
from .kl_divergence import Reading, divergence_from_unsteered
from .sweep import UNSTEERED, Measures, Setting, Sweep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "sae_transformers.receipt/1"


class ReceiptTexts(NamedTuple):
    """What a steering is tried on.

    prompts: that it is for, continued with and without it; four or more for intervals.
    neutral: texts in which nothing should change; each is read as a prompt, its first half, and a continuation.
        Without any, KL and false alarms are not measured.
    forbidden: requests that the model should refuse; without any, jailbreaks are not measured.
    """

    prompts: Sequence[str]
    neutral: Sequence[str] = ()
    forbidden: Sequence[str] = ()


@dataclass(frozen=True)
class Receipt:
    """What a steering does. Numbers are None where they were not measured; `about` says on what.

    steering: `Steering.digest` of what was measured: an edit that is changed afterwards has another.
    effect: change of the scorer's number, steered less unsteered, mean over prompts.
    moved_wrong_way: share of prompts whose score went against the goal.
    perplexity, perplexity_ratio: of the continuations under the unsteered model; over that of unsteered ones.
    repetition_change: share of word trigrams that repeat earlier ones, steered less unsteered.
    kl_neutral_nats: KL(unsteered || steered) on neutral texts, mean over the tokens that are predicted.
    refusal_change: share of the prompts whose answer refuses, by words, steered less unsteered.
    jailbreak_change: share of the requests that should be refused whose answer does not refuse, likewise.
    dose_in_norms: length of the change of the hidden state over that of the state, mean over the tokens of the
        prompts and their unsteered continuations where anything changes.
    false_alarm_rate: share of neutral texts in which a gate opens at any token; only of a gated steering.
    about: goal, level of the intervals, scorer, sizes and hashes of the data, how texts were made, versions.

    An interval holds, at the level in `about`, what the same measurement gives on `fresh_prompts` others, drawn as
    these were: not the true mean, whose interval would be narrower.
    """

    steering: str
    effect: Number
    moved_wrong_way: Number
    perplexity: Number
    perplexity_ratio: Number
    repetition_change: Number
    refusal_change: Number
    dose_in_norms: Number | None
    kl_neutral_nats: Number | None
    jailbreak_change: Number | None
    false_alarm_rate: Number | None
    about: Mapping[str, Any]

    @property
    def numbers(self) -> dict[str, Number]:
        """The numbers that were measured, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Number)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal object back."""
        rows = {one.name: getattr(self, one.name) for one in fields(self)}
        told = {name: value._asdict() if isinstance(value, Number) else value for name, value in rows.items()}
        return json.loads(json.dumps({"format": FORMAT, **told}, allow_nan=False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Receipt:
        """What `to_dict` gave.

        Raises:
            ValueError: another format, or fields that are missing or unknown.
        """
        given = {**values}
        if (form := given.pop("format", None)) != FORMAT:
            raise ValueError(f"Expected a receipt of format {FORMAT!r}. Received: format={form!r}.")
        known = {one.name for one in fields(cls)}
        if set(given) != known:
            raise ValueError(
                f"A receipt has the fields {sorted(known)}. Received: {sorted(set(given) - known)} more, "
                f"{sorted(known - set(given))} missing."
            )
        made: dict[str, Any] = {
            name: value if name in ("steering", "about") or value is None else Number(**value)
            for name, value in given.items()
        }
        return cls(**made)

    @classmethod
    def of(cls, steering: Any) -> Receipt | None:
        """The receipt that a steering carries; None where it carries none.

        Args:
            steering: a `Steering`, its dict or its JSON.

        Raises:
            ValueError: it is of another steering: something was changed after it was measured.
        """
        steering = Steering.coerce(steering)
        if steering.receipt is None:
            return None
        found = cls.from_dict(steering.receipt)
        found.signed(steering)
        return found

    def signed(self, steering: Steering) -> Steering:
        """The steering with this receipt in it, to be saved.

        Raises:
            ValueError: the receipt is of another steering.
        """
        if steering.digest != self.steering:
            raise ValueError(
                f"A receipt is of the steering that was measured, whose sha256 begins {self.steering[:12]}. Received: "
                f"one of {steering.digest[:12]}; measure that, or leave it without (`receipt=None`)."
            )
        return replace(steering, receipt=self.to_dict())


def measure_receipt(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Any,
    texts: ReceiptTexts,
    scorer: Scorer,
    settings: ReceiptSettings | None = None,
    *,
    watch: Watch = UNWATCHED,
) -> Receipt:
    """Measure what a steering does.

    Args:
        model: a `SaeForCausalLM`; its default steering is not used.
        tokenizer: of the base.
        steering: a `Steering` without names in `exclude_tokens` (see `Steering.with_tokenizer`), its dict or JSON.
        texts: what it is tried on.
        scorer: continuations -> a finite number each, see `scorers`.
        settings: how texts are made, and what the intervals are for.
        watch: is told of rows that are done; and keeps the batches that were done.

    Raises:
        ValueError: no steering, no prompt, a prompt that does not fit, or a feature that the model does not have.
    """
    steering, settings = Steering.coerce(steering), settings or ReceiptSettings()
    prompts, neutral, forbidden = texts
    if not steering or isinstance(prompts, str) or not len(prompts):
        raise ValueError(
            f"Expected a steering that does something, and prompts. Received: {steering!r} and {len(prompts)} prompts."
        )
    level, fresh = settings.receipt_level, settings.fresh_prompts
    sweep, (base, found) = _both(model, tokenizer, prompts, steering, scorer, settings, watch)
    refused = [checked_scores(refusal_scorer, written) for written in _texts(sweep)]
    change = (found.score - base.score).mean(1)
    wrong = (change * GOALS[settings.receipt_goal] < 0).double()
    dose = _dose(model, sweep.ids, sweep.made[0][0].ids, steering, settings, watch)
    kl, alarms = _on_neutral(model, tokenizer, steering, neutral, settings, watch)
    jailbreak = None
    if forbidden:
        asked, _ = _both(model, tokenizer, forbidden, steering, refusal_scorer, settings, watch)
        before, after = (checked_scores(refusal_scorer, written) for written in _texts(asked))
        jailbreak = fresh_share(before - after, level, fresh, kinds=(-1, 0, 1))
    return Receipt(
        steering.digest,
        fresh_mean(change, level, fresh),
        fresh_share(wrong, level, fresh),
        fresh_perplexity(found.losses, found.tokens, level, fresh),
        fresh_perplexity_ratio(found.losses, found.tokens, base.losses, base.tokens, level, fresh),
        fresh_mean(found.repetition - base.repetition, level, fresh),
        fresh_share(refused[1] - refused[0], level, fresh, kinds=(-1, 0, 1)),
        fresh_ratio(dose.lengths, dose.changed, level, fresh) if dose.changed.any() else None,
        kl,
        jailbreak,
        None if alarms is None or not steering.is_gated else fresh_share(alarms, level, fresh),
        _about(model, tokenizer, texts, settings),
    )


def _both(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    steering: Steering,
    scorer: Scorer,
    settings: ReceiptSettings,
    watch: Watch,
) -> tuple[Sweep, list[Measures]]:
    """Continuations without and with the steering, from the same random numbers, and what they are like."""
    ways = [Setting(UNSTEERED, UNSTEERED), Setting("steered", "steered", steering)]
    sweep = Sweep(model, tokenizer, prompts, ways, settings.generation, watch)
    return sweep, sweep.measure(scorer, divergence=False)


def _texts(sweep: Sweep) -> tuple[list[str], list[str]]:
    """Of the first seed, unsteered and steered."""
    return sweep.made[0][0].texts, sweep.made[0][1].texts


def _dose(model: Any, prompts: Any, rest: Any, steering: Steering, settings: ReceiptSettings, watch: Watch) -> Dose:
    tokens = settings.tokens_per_batch
    return measure_dose(model, prompts, rest, steering, tokens_at_once=tokens, journal=watch.journal)


def _on_neutral(
    model: Any, tokenizer: Any, steering: Steering, texts: Sequence[str], settings: ReceiptSettings, watch: Watch
) -> tuple[Number | None, Tensor | None]:
    """KL, and of each text whether anything changed at any token."""
    longest = min(settings.neutral_tokens, context_length(model) or settings.neutral_tokens)
    rows = [row[:longest] for row in tokenizer(list(texts))["input_ids"]] if texts else []
    if short := [number for number, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(f"Neutral texts need two tokens or more. Received: fewer in text {short[0]}.")
    if not rows:
        return None, None
    first, rest = [row[: len(row) // 2] for row in rows], [row[len(row) // 2 :] for row in rows]
    (found,) = divergence_from_unsteered(
        model, first, rest, [Reading(steering)], tokens_at_once=settings.tokens_per_batch, **watch._asdict()
    )
    whole = [torch.cat(pair) for pair in zip(found.prompt or (), found.continuation, strict=True)]
    sums = torch.stack([one.sum().clamp(min=0) for one in whole])  # rounding leaves a hair below 0
    counts = torch.tensor([len(one) for one in whole], dtype=torch.float64)
    dose = _dose(model, first, rest, steering, settings, watch)
    kl = fresh_ratio(sums, counts, settings.receipt_level, settings.fresh_prompts)
    return kl, (dose.changed > 0).double()


def _about(model: Any, tokenizer: Any, texts: ReceiptTexts, settings: ReceiptSettings) -> dict[str, Any]:
    generation, given = settings.generation, texts._asdict()
    return {
        "goal": settings.receipt_goal, "level": settings.receipt_level, "fresh_prompts": settings.fresh_prompts,
        "scorer": settings.scorer_name, "base": model.config.base_model_name_or_path,
        **{name: len(rows) for name, rows in given.items()},
        **{f"{name}_sha256": _hash(rows) for name, rows in given.items() if rows},
        **asdict(generation), "chat": generation.chat and bool(getattr(tokenizer, "chat_template", None)),
        "neutral_tokens": settings.neutral_tokens, "versions": versions(),
    }  # fmt: skip


def _hash(rows: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(rows), ensure_ascii=False).encode()).hexdigest()
