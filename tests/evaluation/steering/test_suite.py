"""The steering suite: numbers of every setting, a choice that the reporting half takes no part in, differences."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields
from typing import Any

import pytest
import torch

from sae_transformers.evaluation.classification import bootstrap_interval
from sae_transformers.evaluation.generation.continuations import continue_prompts
from sae_transformers.evaluation.generation.first_divergent_token import first_divergent_token
from sae_transformers.evaluation.generation.fluency import repetition
from sae_transformers.evaluation.results import Results
from sae_transformers.evaluation.settings import BootstrapSettings, FluencyBudget, GenerationSettings
from sae_transformers.evaluation.steering.axbench import SteeringMethod
from sae_transformers.evaluation.steering.kl_divergence import Reading, divergence_from_unsteered
from sae_transformers.evaluation.steering.suite import Describe, choose, compare_methods, within_budget
from sae_transformers.evaluation.steering.sweep import Measures, Setting, Sweep, settings_of
from sae_transformers.evaluation.steering_methods import PreparedMethods
from sae_transformers.evaluation.steering_methods.over_strengths import latent_method, prompt_methods
from sae_transformers.evaluation.suites.settings import SteeringSuiteSettings

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w3 w3", "w10 w11 w12", "w13 w14"]
STRENGTHS = [-1.0, -0.3, 0.3, 1.0]


def settings(new_tokens: int = 6, limit: float = 2.0, **options: Any) -> SteeringSuiteSettings:
    """Small ones; options: of the suite or of its generation."""
    names = {field.name for field in fields(SteeringSuiteSettings)}
    generation = GenerationSettings(new_tokens, seed=3, **{k: v for k, v in options.items() if k not in names})
    rest = {name: value for name, value in options.items() if name in names}
    return SteeringSuiteSettings(
        generation=generation, budget=FluencyBudget(limit), bootstrap=BootstrapSettings(60, 3), **rest
    )


def word_mean(texts: Any) -> list[float]:
    """Mean number of the words, a concept that any text has."""
    numbers = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in texts]
    return [sum(row) / len(row) if row else 0.0 for row in numbers]


@pytest.fixture(scope="module")
def methods() -> dict[str, Any]:
    return {"latent 3": latent_method(3, STRENGTHS), "prompt": prompt_methods(PROMPTS, "w30 w31", "w1")}


@pytest.fixture(scope="module")
def result(model: Any, tokenizer: Any, methods: Any) -> Any:
    made = PreparedMethods(model, tokenizer, PROMPTS, methods, {"texts": 7})
    return compare_methods(made, word_mean, settings(samples_per_prompt=2, samples=2, scorer_name="words"))


def halves() -> tuple[list[int], list[int]]:
    order = random.Random(3).sample(range(6), 6)
    return sorted(order[:3]), sorted(order[3:])


def test_every_number_by_hand(result: Any, model: Any, tokenizer: Any, methods: Any) -> None:
    """Generated, scored and summed anew, one setting and one prompt after the other."""
    _, held = halves()
    steering = methods["latent 3"].steerings[3]
    (row,) = [one for one in result.curves["reporting"] if (one["method"], one["setting"]) == ("latent 3", "1")]
    scores, base_scores, losses, tokens, repeated = [], [], 0.0, 0, []
    for seed in (3, 4):
        for place in held:
            drawn = GenerationSettings(6, seed=seed)
            one = continue_prompts(model, tokenizer, [PROMPTS[place]], [steering], drawn, draws=[place])
            plain = continue_prompts(model, tokenizer, [PROMPTS[place]], settings=drawn, draws=[place])
            scores += word_mean(one.texts)
            base_scores += word_mean(plain.texts)
            losses, tokens = losses + float(one.losses), tokens + int(one.tokens)
            repeated.append(repetition(one.texts))
    assert row["concept_score"] == pytest.approx(sum(scores) / 6)
    assert row["concept_score_change"] == pytest.approx((sum(scores) - sum(base_scores)) / 6)
    assert row["score_by_seed"] == pytest.approx([sum(scores[:3]) / 3, sum(scores[3:]) / 3])
    assert row["perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    assert row["repetition"] == pytest.approx(sum(repeated) / 6)
    first, kl_prompt, kl_after = [], [], []
    for place in held:
        greedy = [
            continue_prompts(model, tokenizer, [PROMPTS[place]], [way], GenerationSettings(6, temperature=0.0)).ids[0]
            for way in (None, steering)
        ]
        first.append(first_divergent_token(greedy[1], greedy[0]))
        plain = continue_prompts(
            model, tokenizer, [PROMPTS[place]], settings=GenerationSettings(6, seed=3), draws=[place]
        )
        ids = [tokenizer(PROMPTS[place])["input_ids"]]
        (found,) = divergence_from_unsteered(model, ids, plain.ids, [Reading(steering)])
        kl_prompt += (found.prompt or [])[0].tolist()
        kl_after += found.continuation[0].tolist()
    assert row["first_divergent_token"] == pytest.approx(sum(first) / 3)
    assert row["kl_prompt_nats"] == pytest.approx(sum(kl_prompt) / len(kl_prompt), rel=1e-3)
    assert row["kl_continuation_nats"] == pytest.approx(sum(kl_after) / len(kl_after), rel=1e-3)


def test_no_steering_and_prompts_are_baselines(result: Any, methods: Any) -> None:
    told = {one.method: one.baseline for one in result.measurements}
    assert {name for name, baseline in told.items() if baseline} == {
        "none", *(name for name in told if name.startswith("prompt ("))
    }  # fmt: skip
    assert None not in told.values() and len(told) == 1 + 2 * len(methods)


def test_no_steering_is_no_change(result: Any) -> None:
    unsteered = [row for row in result.curves["reporting"] if row["method"] == "none"]
    assert len(unsteered) == 1 and unsteered[0]["concept_score_change"] == 0
    assert result.value("first_divergent_token", "none") == 6  # the full length
    assert result.value("kl_prompt_nats", "none") == result.value("kl_continuation_nats", "none") == 0
    names = {one.metric for one in result.measurements if one.method == "none"}
    assert "concept_score_change" not in names and "perplexity_ratio" not in names


def test_the_choice_is_the_best_within_the_budget(result: Any) -> None:
    rows = {(row["method"], row["setting"]): row for row in result.curves["choosing"]}
    limit = 2.0 * rows["none", "none"]["perplexity"]
    for goal, pick in (("raise", max), ("lower", min)):
        for method in ("latent 3", "prompt"):
            allowed = [row for row in rows.values() if row["method"] == method and row["perplexity"] <= limit]
            best = pick(allowed, key=lambda row: row["concept_score"])
            reported = {row["setting"]: row for row in result.curves["reporting"] if row["method"] == method}
            (score,) = [
                one for one in result.measurements
                if (one.metric, one.method) == ("concept_score", f"{method} ({goal})")
            ]  # fmt: skip
            assert score.note == f"setting {best['setting']}" and goal in best["chosen_to"]
            assert score.value == pytest.approx(reported[best["setting"]]["concept_score"])
            assert (score.n, score.seeds, score.better) == (3, 2, {"raise": "higher", "lower": "lower"}[goal])
            assert score.low is not None and score.low <= score.value <= (score.high or 0)
    assert all(row["within_budget"] == (row["perplexity"] <= limit) for row in rows.values())


def test_the_reporting_half_takes_no_part_in_the_choice(model: Any, tokenizer: Any) -> None:
    """Other prompts in its place, and a scorer that turns around there, leave the choice as it is."""
    _, held = halves()
    method: dict[str, Any] = {"latent 3": latent_method(3, STRENGTHS)}
    seen: dict[str, list[str]] = {}

    def run(prompts: list[str], scorer: Any) -> Any:
        made = PreparedMethods(model, tokenizer, prompts, method)
        return compare_methods(made, scorer, settings(divergence=False, temperature=0.0))

    first = run(PROMPTS, word_mean)
    others = [f"w{40 + place} w50" if place in held else text for place, text in enumerate(PROMPTS)]

    def turned(texts: Any) -> list[float]:
        return [
            -1000 * score if number % 6 in held else score  # settings x prompts, in this order
            for number, score in enumerate(word_mean(texts))
        ]

    second = run(others, turned)
    for number, one in enumerate((first, second)):
        seen[str(number)] = [row["setting"] for row in one.curves["choosing"] if row["chosen_to"]]
    assert seen["0"] == seen["1"] and seen["0"]
    drop = ("first_divergent_token", "kl_prompt_nats", "kl_continuation_nats")
    for a, b in zip(first.curves["choosing"], second.curves["choosing"], strict=True):
        assert a["concept_score"] == pytest.approx(b["concept_score"])
        assert all(a[name] is None for name in drop)
    changes = [one.curves["reporting"][1]["concept_score"] for one in (first, second)]
    assert changes[0] != pytest.approx(changes[1])


def test_batches_do_not_matter(model: Any, tokenizer: Any) -> None:
    asked = PROMPTS[:4]
    methods = {"latent 3": latent_method(3, [0.5]), "prompt": prompt_methods(asked, "w30 w31")}
    made = PreparedMethods(model, tokenizer, asked, methods)
    one, eight = (
        compare_methods(made, word_mean, settings(4, goals=("raise",), batch_size=rows, tokens_per_batch=tokens))
        for rows, tokens in ((1, 1), (8, 512))
    )
    assert len(one.measurements) == len(eight.measurements) and not one.samples
    for a, b in zip(one.measurements, eight.measurements, strict=True):
        assert (a.metric, a.method, a.note, a.n) == (b.metric, b.method, b.note, b.n)
        assert a.value == (None if b.value is None else pytest.approx(b.value, rel=1e-3, abs=1e-6))


def test_prompting_is_judged_after_the_plain_prompt(result: Any, model: Any, tokenizer: Any, methods: Any) -> None:
    tried = settings_of(methods, len(PROMPTS))
    sweep = Sweep(model, tokenizer, PROMPTS, tried, GenerationSettings(6, chat=False, seed=3))
    found = sweep.generate(0.7, 3)[5]
    assert tried[5].name == "for"
    told = methods["prompt"][0].instructions
    expected = continue_prompts(model, tokenizer, told, settings=GenerationSettings(6, seed=3))
    assert found.texts == expected.texts
    for row, text in enumerate(PROMPTS):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model.lm(torch.tensor([[*ids, *found.ids[row]]])).logits[0, len(ids) - 1 : -1].double()
        losses = -logits.log_softmax(-1).gather(1, torch.tensor(found.ids[row])[:, None])
        assert float(found.losses[row]) == pytest.approx(float(losses.sum()), rel=1e-4)
    (kl,) = [one for one in result.measurements if (one.metric, one.method) == ("kl_prompt_nats", "prompt (raise)")]
    assert kl.value is None and "not defined" in kl.note
    assert (result.value("kl_continuation_nats", "prompt (raise)") or 0) > 0


def test_the_record(result: Any, methods: Any) -> None:
    text = json.dumps(Results({}, "", "").with_suite(result).to_dict(), allow_nan=False)
    assert Results.from_dict(json.loads(text)).suites["steering"].value("perplexity", "none")
    settings = result.settings
    assert (settings["prompts"], settings["scorer"], settings["texts"]) == (6, "words", 7)
    assert settings["methods"][0]["steering"] == methods["latent 3"].steerings[0].to_dict()
    assert settings["methods"][4]["steering"] is None and len(settings["methods"][4]["instructions_sha256"]) == 64
    _, held = halves()
    assert [row["prompt"] for row in result.samples[::4]] == [PROMPTS[place] for place in held[:2]]
    assert all(
        set(row) == {"prompt", "method", "goal", "setting", "unsteered", "steered", "of"} for row in result.samples
    )
    assert "Received" not in " ".join(result.notes) and len(result.notes) == 3


def test_nothing_within_the_budget(model: Any, tokenizer: Any) -> None:
    made = PreparedMethods(model, tokenizer, PROMPTS[:2], {"latent 3": latent_method(3, [0.5])})
    given = settings(limit=0.5, goals=("raise",), divergence=False, temperature=0.0)
    found = compare_methods(made, word_mean, given)
    (one,) = [m for m in found.measurements if (m.metric, m.method) == ("concept_score", "latent 3 (raise)")]
    assert one.value is None and one.note == "no setting stays within the budget"
    assert not any(row["chosen_to"] for row in found.curves["reporting"]) and not found.samples


def measures(score: float, loss: float, repeated: float) -> Measures:
    one = torch.ones(2, dtype=torch.float64)
    pairs = torch.ones(2, 2, dtype=torch.float64)
    return Measures(score * one[:, None], loss * one, one, repeated * one, one, pairs, pairs)


def test_budget_and_choice() -> None:
    tried = [Setting("none", "none"), *(Setting("a", name) for name in "xyz"), Setting("b", "x")]
    found = [
        measures(0, 1, 0.1),
        measures(1, 1.4, 0.1),
        measures(5, 1.6, 0.1),
        measures(3, 1.3, 0.3),
        measures(9, 1, 0),
    ]
    assert within_budget(found, 1.6) == [True, True, False, True, True]  # exp(0.6) = 1.82 is too much
    assert within_budget(found, 1.6, 0.1) == [True, True, False, False, True]
    assert choose(tried, found, within_budget(found, 1.6), "a", "raise") == 3
    assert choose(tried, found, within_budget(found, 1.6), "a", "lower") == 1
    assert choose(tried, found, within_budget(found, 1.6, 0.1), "a", "raise") == 1
    assert choose(tried, found, [False] * 5, "a", "raise") is None


def test_intervals_are_paired_bootstraps_over_prompts() -> None:
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5

    base, other = (
        Measures(drawn(9, 2), drawn(9), drawn(9), drawn(9), drawn(9), drawn(9, 2), drawn(9, 2)) for _ in range(2)
    )
    found = {one.metric: one for one in Describe(base, 2, BootstrapSettings(100, 4)).steered("a", other, "raise", "x")}

    def ratio(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
        return math.exp(float(a.sum() / b.sum() - c.sum() / d.sum()))

    columns = [other.losses, other.tokens, base.losses, base.tokens]
    expected = {
        "concept_score_change": bootstrap_interval((other.score - base.score).mean(1), resamples=100, seed=4),
        "perplexity_ratio": bootstrap_interval(columns, ratio, resamples=100, seed=4),
        "kl_prompt_nats": bootstrap_interval(
            other.kl_prompt, lambda x: float(x[:, 0].sum() / x[:, 1].sum()), resamples=100, seed=4
        ),
    }
    for metric, ends in expected.items():
        assert (found[metric].low, found[metric].high) == pytest.approx(ends)
    assert found["perplexity_ratio"].value == pytest.approx(ratio(*columns))
    assert {one.interval for one in found.values()} == {"bootstrap over prompts"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompts": PROMPTS[:1]}, "two prompts or more: half choose, half report. Received: 1"),
        ({"goals": ("up",)}, r"goals=\['up'\]"),
        ({"limit": 0.0}, "perplexity_ratio=0.0"),
        ({"samples_per_prompt": 2, "temperature": 0.0}, "samples_per_prompt=2"),
        ({"methods": {"none": latent_method(3, [1.0])}}, "Received: method 'none'"),
        ({"methods": {"a": []}}, r"method 'a' with the settings \[\]"),
        ({"methods": {"a": latent_method(3, [1.0, 1.0])}}, r"settings \['1', '1'\]"),
        ({"methods": {"a": SteeringMethod(["x"], [None], ["w1"])}}, "each of 6 prompts. Received: 1"),
        ({"methods": {"a": latent_method(999, [1.0])}}, "999"),
        ({"scorer": lambda texts: [math.nan] * len(texts)}, "finite numbers"),
        ({"scorer": lambda texts: [1.0]}, r"Received: \(1,\)"),
    ],
)
def test_what_is_refused(model: Any, tokenizer: Any, options: dict[str, Any], told: str) -> None:
    given = {"prompts": PROMPTS, "methods": {"a": latent_method(3, [1.0])}, "scorer": word_mean, "new_tokens": 2}
    given |= {"divergence": False, **options}
    prompts, methods, scorer = (given.pop(name) for name in ("prompts", "methods", "scorer"))
    with pytest.raises(ValueError, match=told):
        compare_methods(PreparedMethods(model, tokenizer, prompts, methods), scorer, settings(**given))
