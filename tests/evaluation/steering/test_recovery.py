"""Attacks on a suppression: the search follows its gradient, the fine-tune leaves no trace, the gap is what counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.generation.log_likelihood import token_scores
from sae_transformers.evaluation.steering import recovery as module
from sae_transformers.evaluation.steering.recovery import (
    ATTACKS,
    RecoverySettings,
    Suppression,
    TargetPairs,
    measure_recovery,
    suppression_costs,
)
from tests.create_training_data.words import word_texts

ALL = Steering([FeatureEdit(feature=feature, op="ablate") for feature in range(64)])
HELD_OUT = TargetPairs(word_texts(6, seed=1), word_texts(6, shortest=4, seed=2))
KNOWN = TargetPairs(word_texts(4, seed=3), word_texts(4, shortest=4, seed=4))
NEUTRAL = TargetPairs(word_texts(5, seed=5), word_texts(5, shortest=4, seed=6))
SETTINGS = RecoverySettings(
    suffix_tokens=3, suffix_steps=4, candidates=6, steps=3, rank=2, target_tokens=6, tokens_per_batch=64, resamples=50
)


def attacked(model: Any, tokenizer: Any, by: Suppression) -> Any:
    return module._Attacked(model, tokenizer, by, SETTINGS)


def losses_by_hand(model: Any, tokenizer: Any, prompts: Any, targets: Any, steering: Any) -> list[float]:
    rows, firsts = [], []
    for prompt, target in zip(prompts, targets, strict=True):
        before = tokenizer(prompt)["input_ids"]
        firsts.append(len(before))
        rows.append(before + tokenizer(target)["input_ids"][: SETTINGS.target_tokens])
    return [-float(one.mean()) for one in token_scores(model, rows, firsts, steering=steering).log_p]


def test_the_loss_is_that_of_the_targets(model: Any, tokenizer: Any) -> None:
    ways = [Suppression(), Suppression(ALL), Suppression(None, "w1 w2")]
    found = suppression_costs(model, tokenizer, ways, HELD_OUT, SETTINGS)
    ruled = [f"w1 w2\n\n{prompt}" for prompt in HELD_OUT.prompts]
    for one, (prompts, steering) in zip(
        found, [(HELD_OUT.prompts, False), (HELD_OUT.prompts, ALL), (ruled, False)], strict=True
    ):
        by_hand = losses_by_hand(model, tokenizer, prompts, HELD_OUT.targets, steering)
        assert one == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    assert len(set(found)) == 3


@torch.no_grad()
def test_where_steering_acts_only_on_the_answer_the_prompt_is_left_alone(model: Any, tokenizer: Any) -> None:
    only_answers = replace(ALL, positions="generated")
    (found,) = suppression_costs(model, tokenizer, [Suppression(only_answers)], HELD_OUT, SETTINGS)
    by_hand = []
    for prompt, target in zip(*HELD_OUT, strict=True):
        before, after = (tokenizer(text)["input_ids"] for text in (prompt, target))
        ids, n = torch.tensor([before + after[: SETTINGS.target_tokens]]), len(before)
        plain = model(ids[:, : n - 1], steering=False, use_cache=True) if n > 1 else None
        steered = model(ids[:, n - 1 :], past_key_values=plain and plain.past_key_values, steering=ALL)
        log_p = steered.logits[0, :-1].log_softmax(-1).gather(1, ids[0, n:, None])
        by_hand.append(-float(log_p.mean()))
    assert found == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)


@pytest.mark.parametrize("by", [Suppression(), Suppression(ALL)])
def test_the_gradient_of_a_suffix_is_that_of_finite_differences(model: Any, tokenizer: Any, by: Suppression) -> None:
    one, suffix = attacked(model, tokenizer, by), [7, 8, 9]
    before, after = one._ids(KNOWN)
    gradient = one.suffix_gradient(before, suffix, after)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    embed, size = model.get_input_embeddings(), 1e-3

    def loss(step: float) -> float:
        total = 0.0
        for a, b in zip(before, after, strict=True):

            def move(_: Any, __: Any, output: torch.Tensor, at: int = len(a)) -> torch.Tensor:
                moved = output.clone()
                moved[0, at : at + len(suffix)] += step * direction
                return moved

            with torch.no_grad(), module._hooked(embed, move):
                total += float(one._loss([[*a, *suffix]], [b]))
        return total / len(before)

    assert float((gradient * direction).sum()) == pytest.approx((loss(size) - loss(-size)) / (2 * size), abs=2e-3)


def test_the_search_lowers_the_loss_and_never_raises_it(model: Any, tokenizer: Any) -> None:
    one = attacked(model, tokenizer, Suppression(ALL))
    before, after = one._ids(KNOWN)
    suffix, trace = one.search_suffix(before, after)
    assert len(trace) == SETTINGS.suffix_steps + 1 and trace == sorted(trace, reverse=True) and trace[-1] < trace[0]
    assert float(one._scored([[*row, *suffix] for row in before], after).mean()) == pytest.approx(trace[-1], abs=1e-5)
    assert not set(suffix) & set(tokenizer.all_special_ids) and max(suffix) < len(tokenizer)


def test_the_fine_tune_learns_and_leaves_no_trace(model: Any, tokenizer: Any) -> None:
    one = attacked(model, tokenizer, Suppression(ALL))
    before, after = one._ids(KNOWN)
    plain = one._scored(before, after)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with one.fine_tuned(before, after) as losses:
        assert len(losses) == SETTINGS.steps and losses[-1] < losses[0]
        assert float(one._scored(before, after).mean()) < float(plain.mean())
    assert torch.equal(one._scored(before, after), plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), one.fine_tuned(before, after):
        raise RuntimeError("inside")
    assert torch.equal(one._scored(before, after), plain)


def test_examples_stand_before_the_prompt(model: Any, tokenizer: Any) -> None:
    one = attacked(model, tokenizer, Suppression(None, "w9"))
    before, _ = one._ids(TargetPairs(["w1"], ["w2"]), [("w3", "w4")])
    assert tokenizer.decode(before[0]).split() == ["w9", "w3", "w4", "w1"]


def test_examples_are_turns_of_a_chat(model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    one = attacked(model, tokenizer, Suppression())
    shown = [one._ids(TargetPairs(["w1"], ["w2"]), examples)[0][0] for examples in ([], [("w3", "w4")])]
    assert [len(row) for row in shown] == [2, 6]  # a role is an unknown word
    assert tokenizer.decode(shown[1]).split()[1::2] == ["w3", "w4", "w1"]


def test_recovery_is_the_gap_that_closes(model: Any, tokenizer: Any) -> None:
    suppressions = {"all": Suppression(ALL), "prompt": Suppression(None, "w5 w6 w7")}
    found = measure_recovery(model, tokenizer, suppressions, HELD_OUT, KNOWN, NEUTRAL, SETTINGS)
    plain = attacked(model, tokenizer, Suppression()).losses(HELD_OUT, KNOWN, NEUTRAL)
    for name, one in found.items():
        own = attacked(model, tokenizer, suppressions[name]).losses(HELD_OUT, KNOWN, NEUTRAL)
        gap = float((own["none"] - plain["none"]).mean())
        assert one.suppressed == pytest.approx(gap) and one.losses["none"] == pytest.approx(float(own["none"].mean()))
        for attack in ATTACKS:
            left = float((own[attack] - plain[attack]).mean())
            assert one.recovered[attack] == pytest.approx(1 - left / gap)
            low, high = one.low[attack], one.high[attack]
            assert low is not None and high is not None and low < high
        assert one.neutral_perplexity_ratio == pytest.approx(
            float((own["neutral"].mean() - plain["neutral"].mean()).exp())
        )
    again = measure_recovery(model, tokenizer, suppressions, HELD_OUT, KNOWN, NEUTRAL, SETTINGS)
    assert again == found


@pytest.mark.parametrize(
    ("place", "pairs", "told"),
    [
        (0, TargetPairs([], []), "`held_out` needs.*0 prompts"),
        (1, TargetPairs(["w1"], ["w2", "w3"]), "`known` needs.*1 prompts, 2 targets"),
        (1, TargetPairs(["w1"], ["w2"]), "needs 2 pairs or more.*Received: 1"),
        (2, TargetPairs(["w1", "w2"], ["w3", ""]), "none in pair 1"),
    ],
)
def test_bad_pairs(model: Any, tokenizer: Any, place: int, pairs: TargetPairs, told: str) -> None:
    given = [HELD_OUT, KNOWN, NEUTRAL]
    given[place] = pairs
    with pytest.raises(ValueError, match=told):
        measure_recovery(model, tokenizer, {"all": Suppression(ALL)}, given[0], given[1], given[2], SETTINGS)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("learning_rate", 0.0), ("shots", 0), ("suffix_steps", 0)])
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        RecoverySettings(**{field: value})
