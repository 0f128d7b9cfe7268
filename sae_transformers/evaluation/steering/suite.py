"""The steering suite: what each way to bring a concept about gains and costs, over its strengths, beside no steering.

    makers = [Latents([(0, 1311)]), Prompting("Write a happy story.")]
    result = compare_methods(prepare_methods(model, tokenizer, prompts, makers), get_scorer("sentiment"))

`evaluation.steering_methods` makes the methods to compare, DiffMean among them, which is fitted to labelled texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..intervals import measured, percentiles, resample_counts
from ..journal import UNWATCHED, Watch
from ..method_ids import FEATURE, MethodId, baseline_method
from ..results import Measurement, SuiteResult, with_methods
from ..scorers.registry import Scorer
from ..settings import BootstrapSettings, GenerationSettings
from ..steering_methods.method import PreparedMethods
from ..suites.settings import GOALS, SteeringSuiteSettings
from .axbench import SteeringMethod
from .sweep import UNSTEERED, Measures, Setting, Sweep, per_position, perplexity, settings_of

if TYPE_CHECKING:
    from ...modeling import SaeForCausalLM

INTERVAL = "bootstrap over prompts"
LONGEST_STEERING = 2000  # characters of JSON that the record keeps; of a longer one, the hash


def compare_methods(
    made: PreparedMethods, scorer: Scorer, settings: SteeringSuiteSettings | None = None, watch: Watch = UNWATCHED
) -> SuiteResult:
    """Measure every setting of every method; choose one a goal on half of the prompts, report it on the other half.

    The choice is the setting with the highest mean score (the lowest, for goal `lower`) among those whose perplexity,
    on the half that chooses, stays within the limit; the other half takes no part in it. Differences to no steering
    are of the same prompts and the same random numbers, and so are their intervals.

    Args:
        made: the model, whose default steering is not used, and two or more prompts, of which half, drawn by the
            seed, choose. A name has a `SteeringMethod`, or several whose settings are tried as one method's (an
            instruction for the concept and one against it); `none` is always measured. The facts go into the record.
        scorer: continuations -> a finite number each, see `scorers`.
        settings: a prompt has a continuation for each sample, of seeds `seed`, `seed + 1`, ... The seed of
            `generation` draws the halves too.
        watch: is told of rows that are done; and keeps the batches that were done.

    Returns:
        Measurements on the reporting half, of `none` and of each `METHOD (GOAL)`:

        concept_score, concept_score_change: mean over prompts, and its difference to no steering.
        perplexity, perplexity_ratio: of the unsteered model on the continuations after the plain prompts.
        repetition, repetition_change: share of word trigrams that repeat earlier ones.
        first_divergent_token: of greedy text against the unsteered model's, mean over prompts; SCAR's FDT.
        kl_prompt_nats: KL(unsteered || steered), mean over the positions that predict the prompts' tokens but the
            first; not defined where another prompt is read.
        kl_continuation_nats: the same over the unsteered model's own continuations (of the first seed), which all
            methods read, each after its own prompt.

        Curves `choosing` and `reporting` hold every setting on each half.

    Raises:
        ValueError: too few prompts, a method named `none` or without settings, another
            number of instructions than prompts, a feature that the model does not have, or scores that are not
            finite.
    """
    model, tokenizer, prompts, methods = made.model, made.tokenizer, made.prompts, made.methods
    n = len(prompts)
    if isinstance(prompts, str) or n < 2:
        raise ValueError(f"Expected two prompts or more: half choose, half report. Received: {n}.")
    settings = settings or SteeringSuiteSettings()
    generation, bootstrap, budget = settings.generation, settings.bootstrap, settings.budget
    tried = settings_of(methods, n)
    order = random.Random(generation.seed).sample(range(n), n)
    halves = {"choosing": sorted(order[: n // 2]), "reporting": sorted(order[n // 2 :])}
    sweep = Sweep(model, tokenizer, prompts, tried, generation, watch)
    measured = sweep.measure(scorer, divergence=settings.divergence, tokens_at_once=settings.tokens_per_batch)
    parts = {half: [one.take(rows) for one in measured] for half, rows in halves.items()}
    allowed = within_budget(parts["choosing"], budget.perplexity_ratio, budget.added_repetition)
    chosen = {
        (name, goal): choose(tried, parts["choosing"], allowed, name, goal)
        for name in methods for goal in settings.goals
    }  # fmt: skip
    described = Describe(parts["reporting"][0], generation.samples_per_prompt, bootstrap)
    measurements = described.unsteered()
    for (name, goal), place in chosen.items():
        steered = None if place is None else parts["reporting"][place]
        measurements += described.steered(
            f"{name} ({goal})", steered, goal, "" if place is None else tried[place].name
        )
    known = {(name, goal): _method(model, one, f"{name} ({goal})") for name, one in methods.items()
             for goal in settings.goals}  # fmt: skip
    measurements = with_methods(measurements, [baseline_method("none", UNSTEERED), *known.values()])
    curves = {
        half: list(_curve(tried, found, allowed, chosen, Describe(found[0], 1, bootstrap)))
        for half, found in parts.items()
    }
    record = {
        "prompts": n, "prompts_sha256": _hash(list(prompts)), "methods": [_recorded(one) for one in tried[1:]],
        "scorer": settings.scorer_name, "goals": list(settings.goals), "chat": templated(generation, tokenizer),
        "perplexity_limit": budget.perplexity_ratio, "repetition_limit": budget.added_repetition,
        "new_tokens": generation.max_new_tokens, "temperature": generation.temperature, "top_p": generation.top_p,
        "generation_seeds": generation.samples_per_prompt, "divergence": settings.divergence,
        "resamples": bootstrap.resamples, "seed": generation.seed, **made.facts,
    }  # fmt: skip
    notes = [
        f"Settings were chosen on {len(halves['choosing'])} prompts and are reported on the other "
        f"{len(halves['reporting'])}.",
        "Perplexity is the unsteered model's, of the continuations after the plain prompts.",
        "KL is KL(unsteered || steered), mean over tokens: those of the prompts, and those of the unsteered model's "
        "continuations.",
    ]
    shown = [
        {
            "prompt": prompts[row], "method": name, "goal": goal, "setting": tried[place].name,
            "unsteered": sweep.made[0][0].texts[row], "steered": sweep.made[0][place].texts[row],
            "of": known[name, goal].to_dict(),
        }
        for row in halves["reporting"][: settings.samples] for (name, goal), place in chosen.items()
        if place is not None
    ]  # fmt: skip
    return SuiteResult("steering", record, measurements, curves=curves, samples=shown, notes=notes)


def templated(generation: GenerationSettings, tokenizer: Any) -> bool:
    """Whether prompts stand in a chat template."""
    return generation.chat and bool(getattr(tokenizer, "chat_template", None))


def _method(model: SaeForCausalLM, one: SteeringMethod | Sequence[SteeringMethod], label: str) -> MethodId:
    """What a method is, with its latent's number."""
    parts = [one] if isinstance(one, SteeringMethod) else list(one)
    of = replace(parts[0].of, label=label, baseline=all(part.of.baseline for part in parts))
    if of.kind != FEATURE or of.sae is None or of.feature is None:
        return of
    return replace(of, feature=model.config.sae_configs[of.sae].resolve_feature(of.feature))


def within_budget(
    measured: Sequence[Measures], perplexity_limit: float, repetition_limit: float | None = None
) -> list[bool]:
    """Whether each setting stays within the limits; the first of them is no steering, which the limits refer to."""
    of = [(perplexity(one.losses, one.tokens), float(one.repetition.mean())) for one in measured]
    most = perplexity_limit * of[0][0], math.inf if repetition_limit is None else repetition_limit + of[0][1]
    return [likely <= most[0] and repeated <= most[1] for likely, repeated in of]


def choose(
    settings: Sequence[Setting], measured: Sequence[Measures], allowed: Sequence[bool], method: str, goal: str
) -> int | None:
    """Place of the allowed setting of a method with the best mean score, the first of equals; None without any."""
    places = [i for i, one in enumerate(settings) if one.method == method and allowed[i]]
    return max(places, key=lambda i: GOALS[goal] * float(measured[i].score.mean()), default=None)


class Describe:
    """Numbers with their intervals, and differences to no steering on the same prompts, resampled alike."""

    def __init__(self, unsteered: Measures, seeds: int, bootstrap: BootstrapSettings) -> None:
        self.base, self.seeds = unsteered, seeds
        n = len(unsteered.tokens)
        self.once = torch.ones(1, n, dtype=torch.float64)
        self.draws = resample_counts(n, bootstrap.resamples, bootstrap.seed)

    def unsteered(self) -> list[Measurement]:
        found = self._of(UNSTEERED, self.base, None, "")
        return [one for one in found if not one.metric.endswith(("_change", "_ratio"))]

    def steered(self, method: str, measured: Measures | None, goal: str, setting: str) -> list[Measurement]:
        """Of one method at its chosen setting; without one, measurements without a value say so."""
        if measured is None:
            note = "no setting stays within the budget"
            return [Measurement(name, None, method, note=note) for name in ("concept_score", "concept_score_change")]
        return self._of(method, measured, goal, f"setting {setting}")

    def change(self, measured: Measures) -> tuple[float, float | None, float | None]:
        """Of the concept's score: mean, low, high."""
        change = measured.score.mean(1) - self.base.score.mean(1)
        return float(change.mean()), *percentiles(_mean(self.draws, change))

    def _of(self, method: str, found: Measures, goal: str | None, note: str) -> list[Measurement]:
        base = self.base
        better = {None: "", "raise": "higher", "lower": "lower"}[goal]
        rows: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
            ("concept_score", lambda draws: _mean(draws, found.score.mean(1)), better),
            ("concept_score_change", lambda draws: _mean(draws, (found.score - base.score).mean(1)), better),
            ("perplexity", lambda draws: _mean_loss(draws, found).exp(), "lower"),
            ("perplexity_ratio", lambda draws: (_mean_loss(draws, found) - _mean_loss(draws, base)).exp(), "lower"),
            ("repetition", lambda draws: _mean(draws, found.repetition), "lower"),
            ("repetition_change", lambda draws: _mean(draws, found.repetition - base.repetition), "lower"),
            ("first_divergent_token", lambda draws: _mean(draws, found.divergent), ""),
            ("kl_prompt_nats", lambda draws: _per_position(draws, found.kl_prompt), "lower"),
            ("kl_continuation_nats", lambda draws: _per_position(draws, found.kl_continuation), "lower"),
        ]
        made = []
        for name, statistic, direction in rows:
            value = float(statistic(self.once))
            seeds = 1 if name.startswith(("first", "kl")) else self.seeds
            told = "not measured, or not defined" if math.isnan(value) else note
            facts = {"n": found.tokens.numel(), "seeds": seeds, "better": direction, "note": told}
            made.append(measured(name, value, method, statistic(self.draws), interval=INTERVAL, **facts))
        return made


# -- statistics of draws (resamples, n): how often each prompt counts, (resamples,) ----------------------------------


def _mean(draws: Tensor, values: Tensor) -> Tensor:
    return draws @ values / draws.sum(1)


def _mean_loss(draws: Tensor, found: Measures) -> Tensor:
    """Nats a token."""
    return ((draws @ found.losses) / (draws @ found.tokens)).clamp(max=700)


def _per_position(draws: Tensor, sums: Tensor) -> Tensor:
    total, count = (draws @ sums).T
    return total / count  # 0 / 0, where no position was drawn, is nan and does not count


def _curve(
    settings: Sequence[Setting],
    measured: Sequence[Measures],
    allowed: Sequence[bool],
    chosen: Mapping[tuple[str, str], int | None],
    describe: Describe,
) -> Iterator[dict[str, Any]]:
    """A row a setting. score_by_seed: mean over prompts of each generation seed."""
    for place, (setting, found, within) in enumerate(zip(settings, measured, allowed, strict=True)):
        change, low, high = describe.change(found)
        row = {
            "method": setting.method, "setting": setting.name, "concept_score": float(found.score.mean()),
            "concept_score_change": change, "concept_score_change_low": low, "concept_score_change_high": high,
            "score_by_seed": found.score.mean(0).tolist(), "perplexity": perplexity(*found[1:3]),
            "repetition": float(found.repetition.mean()), "first_divergent_token": float(found.divergent.mean()),
            "kl_prompt_nats": per_position(found.kl_prompt),
            "kl_continuation_nats": per_position(found.kl_continuation),
        }  # fmt: skip
        plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        goals = [goal for (_, goal), at in chosen.items() if at == place]
        yield {**plain, "within_budget": within, "chosen_to": goals}


def _recorded(one: Setting) -> dict[str, Any]:
    steering = None if one.steering is None else one.steering.to_dict()
    if steering is not None and len(json.dumps(steering)) > LONGEST_STEERING:
        steering = {"sha256": _hash(steering)}
    told = None if one.instructions is None else _hash(list(one.instructions))
    return {"method": one.method, "setting": one.name, "steering": steering, "instructions_sha256": told}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
