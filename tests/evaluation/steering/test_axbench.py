"""Ratings, their harmonic mean, the offline judge, and settings chosen on one half and reported on the other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.generation.continuations import Continuations, continue_prompts, likelihood
from sae_transformers.evaluation.settings import GenerationSettings
from sae_transformers.evaluation.steering.axbench import (
    OfflineJudge,
    Ratings,
    SteeringMethod,
    evaluate_concept_steering,
    word_scorer,
)

ASKED = ["w1 w2 w3", "w4 w5 w6", "w7 w8 w9", "w10 w11 w12"]
DOUBLE = torch.float64


def answers(texts: list[str], perplexity: float = 2.0) -> Continuations:
    n = len(texts)
    return Continuations(
        texts, torch.full((n,), 5 * torch.tensor(perplexity).log().item(), dtype=DOUBLE), torch.full((n,), 5)
    )


def test_overall_is_the_harmonic_mean() -> None:
    ratings = Ratings(*(torch.tensor(values, dtype=DOUBLE) for values in ([2, 1, 0], [2, 2, 2], [2, 0.5, 2])))
    assert ratings.overall.tolist() == pytest.approx([2.0, 3 / (1 + 0.5 + 2), 0.0])


def test_word_scorer_knows_the_words_of_the_concept() -> None:
    score = word_scorer(["sea ship wave", "ship sail sea"], ["road car wheel", "car road tyre"])
    found = score(["a ship at sea", "a car on the road"])
    assert found[0] > 0.7 and found[1] < 0.3 and score([]).shape == (0,)
    with pytest.raises(ValueError, match="1 with, 0 without"):
        word_scorer(["a"], [])
    with pytest.raises(ValueError, match="0 with, 1 without"):
        OfflineJudge([], ["a"])


def test_offline_judge() -> None:
    asked = ["tell me about ships", "tell me about cooking"]
    judge = OfflineJudge(["sea ship wave"], ["pan oven cook"], {asked[0]: "a ship sails", asked[1]: "use an oven"})
    texts = ["the ship sails on the sea", "the ship sails on the sea", "", "use use use use use use an oven"]
    found = judge([asked[0], asked[1], asked[0], asked[1]], answers(texts), 2.0)
    assert found.concept[0] == found.concept[1] > 1 and found.concept[3] < 1
    assert found.instruction.tolist() == [2.0, 0.0, 0.0, 2.0]
    # six "use" in a row: 4 trigrams of them, one of which is new, and 2 others
    assert found.fluency.tolist() == pytest.approx([2.0, 2.0, 0.0, 2 * 3 / 6])
    assert found.overall[2] == 0
    slower = judge([asked[0]] * 4, answers(texts, perplexity=8.0), 2.0)
    assert slower.fluency.tolist() == pytest.approx([0.5, 0.5, 0.0, 0.25])
    assert slower.instruction[:2].tolist() == [2.0, 2.0]  # no other instruction to compare with


def test_settings_are_chosen_on_one_half_and_reported_on_the_other(model: Any, tokenizer: Any) -> None:
    def steering(value: float) -> Steering:
        return Steering([FeatureEdit(feature=3, op="direction", value=value, unit="norm")])

    values = {"0.5": 0.5, "1": 1.0, "4": 4.0}
    asked = [f"{text} w20" for text in ASKED]
    methods = {
        "none": SteeringMethod(["none"], [None]),
        "latent": SteeringMethod(list(values), [steering(v) for v in values.values()]),
        "prompt": SteeringMethod(["prompt"], [None], asked),
    }
    seen: list[tuple[list[str], Continuations, float]] = []

    def judge(instructions: Any, found: Continuations, unsteered: float) -> Ratings:
        seen.append((list(instructions), found, unsteered))
        length = torch.tensor([(sum(map(ord, text)) % 20) / 10 for text in found.texts], dtype=DOUBLE)
        return Ratings(length, torch.full_like(length, 2.0), torch.full_like(length, 1.0))

    greedy = GenerationSettings(6, temperature=0.0)
    settings = GenerationSettings(6, temperature=0.0, seed=1, batch_size=5)
    results = evaluate_concept_steering(model, tokenizer, ASKED, methods, judge, settings)
    plain = continue_prompts(model, tokenizer, ASKED, settings=greedy)
    steered = continue_prompts(
        model, tokenizer, ASKED * 3, [steering(v) for v in values.values() for _ in ASKED], greedy
    )
    told = continue_prompts(model, tokenizer, asked, settings=greedy)
    assert [found.texts for _, found, _ in seen] == [plain.texts, steered.texts, told.texts]
    assert [instructions for instructions, *_ in seen] == [ASKED, ASKED * 3, ASKED]
    assert [unsteered for *_, unsteered in seen] == pytest.approx([plain.perplexity] * 3, rel=1e-5)
    as_answers = likelihood(model, tokenizer, ASKED, told.texts)  # after the plain instruction
    assert torch.allclose(seen[2][1].losses, as_answers.losses)
    order = random.Random(1).sample(range(4), 4)
    search, held = sorted(order[:2]), sorted(order[2:])
    overall = judge(ASKED * 3, steered, 1.0).overall.view(3, 4)
    best = int(overall[:, search].mean(1).argmax())
    result = results["latent"]
    assert result.setting == list(values)[best]
    assert list(result.curve.values()) == pytest.approx(overall[:, search].mean(1).tolist())
    assert result.overall == pytest.approx(float(overall[best, held].mean()))
    assert (result.instruction, result.fluency) == (2.0, 1.0)
    assert result.perplexity == pytest.approx(steered.take([best * 4 + i for i in held]).perplexity, rel=1e-5)
    assert set(result.numbers()) == {"concept", "instruction", "fluency", "overall", "perplexity", "repetition"}


def rate(value: float, n: int | None = None) -> Any:
    return lambda asked, found, _: Ratings(*(torch.full((n or len(asked),), value, dtype=DOUBLE) for _ in range(3)))


@pytest.mark.parametrize(
    ("asked", "instructions", "judge", "told"),
    [
        (ASKED[:1], None, rate(1.0), "two instructions or more. Received: 1"),
        (ASKED, ASKED[:2], rate(1.0), "each of 4 instructions. Received: 2"),
        (ASKED, None, rate(float("nan")), "4 of them outside"),
        (ASKED, None, rate(2.5), "4 of them outside"),
        (ASKED, None, rate(1.0, 3), r"concept of shape \(3,\)"),
    ],
)
def test_what_is_refused(model: Any, tokenizer: Any, asked: Any, instructions: Any, judge: Any, told: str) -> None:
    methods = {"none": SteeringMethod(["none"], [None], instructions)}
    with pytest.raises(ValueError, match=told):
        evaluate_concept_steering(model, tokenizer, asked, methods, judge, GenerationSettings(3, temperature=0.0))


def test_a_setting_needs_a_steering() -> None:
    with pytest.raises(ValueError, match="2 settings, 1 steerings"):
        SteeringMethod(["a", "b"], [None])
