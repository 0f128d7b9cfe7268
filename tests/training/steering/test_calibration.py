"""Calibration: the best rung within the budget, held-out prompts, and what happens where nothing is allowed."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from sae_transformers.evaluation.generation.continuations import continue_prompts
from sae_transformers.evaluation.generation.fluency import repetition
from sae_transformers.evaluation.settings import FluencyBudget, GenerationSettings
from sae_transformers.training.steering.calibration import (
    calibrate,
    ladders_of,
    split_prompts,
)
from sae_transformers.training.steering.settings import NORMS, STRENGTHS
from tests.create_training_data.words import WORDS, word_tokenizer
from tests.tiny import tiny_base, tiny_model

PROMPTS = [f"{a} {b} {c}" for a, b, c in zip(WORDS[:6], WORDS[10:16], WORDS[20:26], strict=True)]
GREEDY, FOUR = GenerationSettings(8, temperature=0.0), GenerationSettings(4, temperature=0.0)
FREE = FluencyBudget(perplexity_ratio=1e9)
STEPS = {"direction": (0.5, 1.0, 4.0)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = word_tokenizer()
    made.padding_side = "left"
    return made


def share_of(word: str) -> Any:
    """How much of a text is one word."""
    return lambda texts: [text.split().count(word) / max(1, len(text.split())) for text in texts]


def favourite(model: Any, tokenizer: Any, feature: int) -> str:
    """A word that steering along a latent brings about."""
    strong = Steering([FeatureEdit(feature=feature, op="direction", value=4.0, unit="norm")])
    words = " ".join(continue_prompts(model, tokenizer, PROMPTS, [strong] * 6, GREEDY).texts).split()
    return max(sorted(set(words)), key=words.count)


def test_the_best_rung_within_the_budget_is_chosen(model: Any, tokenizer: Any) -> None:
    word = favourite(model, tokenizer, 3)
    ladders = ladders_of([(0, 3), (0, 9)], ["direction"], strengths=STEPS)
    drawn = replace(GREEDY, seed=2)
    free = calibrate(model, tokenizer, PROMPTS, share_of(word), ladders, drawn, FREE)
    assert len(free.curve) == 6 and all(point.within_budget for point in free.curve)
    best = max(free.curve, key=lambda point: (point.score, -point.perplexity))
    assert free.steering == best.steering and best.score > free.unsteered.score
    assert free.steering.feature_edits[0].feature == 3
    search, held = split_prompts(PROMPTS, 0.5, 2)
    for prompts, point in ((search, best), (held, free.report[1] if free.report else best)):
        found = continue_prompts(model, tokenizer, prompts, [best.steering] * len(prompts), GREEDY)
        scores = torch.tensor(share_of(word)(found.texts))
        assert point.score == pytest.approx(float(scores.mean()))
        assert point.score_error == pytest.approx(float(scores.std() / len(scores) ** 0.5))
        assert point.perplexity == pytest.approx(found.perplexity, rel=1e-4)
        assert point.repetition == pytest.approx(repetition(found.texts))
    again = calibrate(model, tokenizer, PROMPTS, share_of(word), ladders, drawn, FREE)
    assert json.dumps(again.to_dict()) == json.dumps(free.to_dict())


def test_a_ladder_ends_beyond_the_budget(model: Any, tokenizer: Any) -> None:
    word = favourite(model, tokenizer, 3)
    ladders = ladders_of([(0, 3)], ["direction"], strengths=STEPS)
    free = calibrate(model, tokenizer, PROMPTS, share_of(word), ladders, GREEDY, FREE)
    ratios = [point.perplexity / free.unsteered.perplexity for point in free.curve]
    limit = (sorted(ratios)[0] + sorted(ratios)[1]) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = calibrate(model, tokenizer, PROMPTS, share_of(word), ladders, GREEDY, FluencyBudget(limit))
    beyond = [place for place, ratio in enumerate(ratios) if ratio > limit]
    assert len(found.curve) == beyond[0] + 1
    assert [point.within_budget for point in found.curve] == [True] * beyond[0] + [False]


def test_nothing_within_the_budget_is_no_steering_and_a_warning(model: Any, tokenizer: Any) -> None:
    ladders = ladders_of([(0, 3)], ["direction"], strengths=STEPS)
    with pytest.warns(UserWarning, match="of 1 tried, 0 are within 1e-06 times"):
        found = calibrate(model, tokenizer, PROMPTS, len_of, ladders, FOUR, FluencyBudget(1e-6))
    assert not found.steering and found.report is not None
    assert found.report[0].score == found.report[1].score
    with pytest.warns(UserWarning, match="none of these scores above"):
        found = calibrate(model, tokenizer, PROMPTS, lambda t: [1.0] * len(t), ladders, FOUR)
    assert found.steering == Steering()


def len_of(texts: Any) -> list[int]:
    return [len(text) for text in texts]


def test_repetition_can_be_limited(model: Any, tokenizer: Any) -> None:
    word = favourite(model, tokenizer, 3)
    ladders = ladders_of([(0, 3)], ["direction"], strengths={"direction": (4.0,)})
    drawn = replace(GREEDY, max_new_tokens=12)
    free = calibrate(model, tokenizer, PROMPTS, share_of(word), ladders, drawn, FREE)
    added = free.curve[0].repetition - free.unsteered.repetition
    assert added > 0 and free.steering
    with pytest.warns(UserWarning, match="0 are within"):
        found = calibrate(model, tokenizer, PROMPTS, share_of(word), ladders, drawn, FluencyBudget(1e9, added / 2))
    assert not found.steering and not found.curve[0].within_budget


def test_samples_share_their_noise(model: Any, tokenizer: Any) -> None:
    same = [[Steering([FeatureEdit(feature=3, op="scale", value=1.0)])]]
    with pytest.warns(UserWarning, match="none of these scores above"):
        drawn = GenerationSettings(5, temperature=1.0, samples_per_prompt=2)
        found = calibrate(model, tokenizer, PROMPTS, len_of, same, drawn, report_share=0)
    assert found.curve[0].score == found.unsteered.score and found.report is None
    assert found.curve[0].perplexity == pytest.approx(found.unsteered.perplexity, rel=1e-4)


def test_ladders() -> None:
    up = ladders_of([(0, 3), (1, "joy")], ["direction", "scale", "ablate"])
    assert [len(ladder) for ladder in up] == [len(NORMS)] * 2 + [len(STRENGTHS["scale"])] * 2 + [1] * 2
    first, last = up[0][0].feature_edits[0], up[3][-1].feature_edits[0]
    assert (first.op, first.value, first.unit) == ("direction", NORMS[0], "norm")
    assert (last.sae, last.feature, last.op, last.value, last.unit) == (1, "joy", "scale", 32.0, "absolute")
    down = ladders_of([(0, 3)], ["scale", "set"], lower=True, positions="generated", keep_error=False)
    assert [steering.feature_edits[0].value for steering in down[0]] == [0.0, -2.0, -4.0, -8.0, -16.0, -32.0]
    assert down[1][0].feature_edits[0].value == -NORMS[0]
    assert down[0][0].positions == "generated" and not down[0][0].keep_error
    with pytest.raises(ValueError, match="0 features"):
        ladders_of([])
    with pytest.raises(ValueError, match="'shrink'"):
        ladders_of([(0, 3)], ["shrink"])


def test_prompts_are_split_by_the_seed() -> None:
    search, held = split_prompts(PROMPTS, 0.5, 0)
    assert len(search) == len(held) == 3 and sorted(search + held) == sorted(PROMPTS)
    assert split_prompts(PROMPTS, 0.5, 0) == (search, held) and split_prompts(PROMPTS, 0.5, 3) != (search, held)
    search, held = split_prompts([*PROMPTS, *PROMPTS[:3], PROMPTS[0]], 0.5, 0)
    assert not set(search) & set(held) and len(search) + len(held) == 10 and len(set(held)) == 3
    with pytest.raises(ValueError, match="3 prompts, 1 of them different, report_share=0.5"):
        split_prompts(PROMPTS[:1] * 3, 0.5, 0)
    with pytest.raises(ValueError, match="1 prompts, 1 of them different, report_share=0.5"):
        split_prompts(PROMPTS[:1], 0.5, 0)
    with pytest.raises(ValueError, match="0 prompts"):
        split_prompts([], 0.0, 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scorer": lambda t: [math.nan] * len(t)}, "3 of 3 that are not"),
        ({"scorer": lambda t: [1.0]}, r"each of 3 texts. Received: \(1,\)"),
        ({"ladders": []}, r"Received: \[\]"),
        ({"ladders": [[]]}, r"Received: \[0\]"),
        ({"ladders": [[Steering([FeatureEdit(0, 64, "ablate")])]]}, "64"),
        ({"ladders": [[Steering([FeatureEdit(1, 3, "ablate")])]]}, r"1 SAE\(s\), numbered from 0. Received: sae=1"),
        ({"report_share": 1.0}, "report_share=1.0"),
        ({"prompts": ["w1 " * 126, "w2 " * 126]}, "context of 128"),
    ],
)
def test_what_is_refused(model: Any, tokenizer: Any, change: dict, told: str) -> None:
    given: dict[str, Any] = {
        "prompts": PROMPTS, "scorer": len_of, "ladders": ladders_of([(0, 3)]), "generation": FOUR, **change
    }  # fmt: skip
    with pytest.raises(ValueError, match=told):
        calibrate(model, tokenizer, given.pop("prompts"), given.pop("scorer"), given.pop("ladders"), **given)


def test_a_model_without_an_sae_there_is_refused(tokenizer: Any) -> None:
    bare: Any = SaeForCausalLM.from_base(tiny_base(), saes=[]).eval()
    with pytest.raises(ValueError, match="no SAE to steer"):
        calibrate(bare, tokenizer, PROMPTS, len_of, ladders_of([(0, 3)]))
