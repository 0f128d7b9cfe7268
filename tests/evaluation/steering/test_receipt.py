"""A receipt's numbers are those of a hand count, it belongs to one steering, and its file is a steering's."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_transformers import (
    FeatureEdit,
    Gate,
    GenerationSettings,
    Receipt,
    ReceiptSettings,
    ReceiptTexts,
    Steering,
    continue_prompts,
    measure_receipt,
)
from sae_transformers.evaluation.scorers.refusal import refusal_scorer
from sae_transformers.evaluation.steering.kl_divergence import kl_divergence
from sae_transformers.evaluation.steering_methods.over_strengths import scaled_steering
from tests.create_training_data.words import word_texts

PROMPTS, NEUTRAL = word_texts(10, seed=1), word_texts(12, shortest=6, seed=2)
GENERATION = GenerationSettings(max_new_tokens=6, samples_per_prompt=2, batch_size=5)
SETTINGS = ReceiptSettings(generation=GENERATION, scorer_name="low words")
PUSH = Steering([FeatureEdit(feature=3, op="direction", value=0.3, unit="norm")])
GATED = replace(PUSH, when=Gate(feature=9, above=0.8, over="so_far"))
SHUT = replace(PUSH, when=Gate(feature=9, above=1e6, over="prompt"))


def low_words(texts: Sequence[str]) -> list[float]:
    """Share of the words of the first half of the vocabulary."""
    return [sum(word < "w5" for word in text.split()) / max(1, len(text.split())) for text in texts]


@pytest.fixture(scope="module")
def receipt(model: Any, tokenizer: Any) -> Receipt:
    return measure_receipt(model, tokenizer, PUSH, ReceiptTexts(PROMPTS, NEUTRAL, PROMPTS[:4]), low_words, SETTINGS)


def ids_of(tokenizer: Any, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt")["input_ids"]


def test_effect_and_damage_are_those_of_the_texts(receipt: Receipt, model: Any, tokenizer: Any) -> None:
    changes, losses, tokens, base_losses, base_tokens = [], 0.0, 0, 0.0, 0
    for seed in (0, 1):
        settings = replace(GENERATION, seed=seed, samples_per_prompt=1)
        plain = continue_prompts(model, tokenizer, PROMPTS, None, settings)
        steered = continue_prompts(model, tokenizer, PROMPTS, [PUSH] * len(PROMPTS), settings)
        changes.append([b - a for a, b in zip(low_words(plain.texts), low_words(steered.texts), strict=True)])
        losses, tokens = losses + float(steered.losses.sum()), tokens + int(steered.tokens.sum())
        base_losses, base_tokens = base_losses + float(plain.losses.sum()), base_tokens + int(plain.tokens.sum())
    change = torch.tensor(changes, dtype=torch.float64).mean(0)
    assert receipt.effect.value == pytest.approx(float(change.mean())) and receipt.effect.n == len(PROMPTS)
    assert receipt.effect.low is not None and receipt.effect.low < receipt.effect.value
    assert receipt.moved_wrong_way.value == pytest.approx(float((change < 0).double().mean())) != 0
    assert receipt.perplexity.value == pytest.approx(math.exp(losses / tokens))
    assert receipt.perplexity_ratio.value == pytest.approx(math.exp(losses / tokens - base_losses / base_tokens))


def test_the_dose_of_a_push_in_norms_is_what_was_asked_for(receipt: Receipt) -> None:
    assert receipt.dose_in_norms is not None
    assert receipt.dose_in_norms.value == pytest.approx(0.3, abs=1e-5)


@torch.no_grad()
def test_the_dose_of_an_ablation_is_a_hand_count(model: Any, tokenizer: Any) -> None:
    steering = Steering([FeatureEdit(feature=feature, op="ablate") for feature in range(32)], positions="prompt")
    settings = replace(SETTINGS, generation=replace(GENERATION, samples_per_prompt=1))
    found = measure_receipt(model, tokenizer, steering, ReceiptTexts(PROMPTS), low_words, settings)
    lengths = []
    for text in PROMPTS:
        ids = ids_of(tokenizer, text)
        hidden = model(ids, steering=False, output_sae_inputs=True).sae_inputs[0][0]
        latents = model.saes[0].encode(hidden)[:, :32]
        change = (latents @ model.saes[0].W_dec[:32]).norm(dim=-1)
        lengths += [float(a / b) for a, b in zip(change, hidden.norm(dim=-1), strict=True) if a > 0]
    assert found.dose_in_norms is not None
    assert found.dose_in_norms.value == pytest.approx(sum(lengths) / len(lengths), rel=1e-4)
    assert found.kl_neutral_nats is None and found.false_alarm_rate is None and found.jailbreak_change is None


@torch.no_grad()
def test_neutral_kl_is_a_forward_pass_by_hand(receipt: Receipt, model: Any, tokenizer: Any) -> None:
    total, count = 0.0, 0
    for text in NEUTRAL:
        ids = ids_of(tokenizer, text)
        log_p, log_q = (model(ids, steering=s).logits[0, :-1].log_softmax(-1) for s in (False, PUSH))
        total, count = total + float(kl_divergence(log_p, log_q).sum()), count + ids.shape[1] - 1
    assert receipt.kl_neutral_nats is not None
    assert receipt.kl_neutral_nats.value == pytest.approx(total / count, rel=1e-4)
    assert receipt.kl_neutral_nats.low is not None and 0 < receipt.kl_neutral_nats.low < receipt.kl_neutral_nats.value


@torch.no_grad()
def test_false_alarms_are_the_neutral_texts_that_open_the_gate(model: Any, tokenizer: Any) -> None:
    found = measure_receipt(model, tokenizer, GATED, ReceiptTexts(PROMPTS, NEUTRAL), low_words, SETTINGS)
    opened = []
    for text in NEUTRAL:
        hidden = model(ids_of(tokenizer, text), steering=False, output_sae_inputs=True).sae_inputs[0]
        opened.append(bool((model.saes[0].encode(hidden)[0, :, 9] > 0.8).any()))
    assert found.false_alarm_rate is not None and 0 < sum(opened) < len(opened)
    assert found.false_alarm_rate.value == pytest.approx(sum(opened) / len(opened))


def test_a_gate_that_stays_shut_changes_nothing(model: Any, tokenizer: Any) -> None:
    found = measure_receipt(model, tokenizer, SHUT, ReceiptTexts(PROMPTS, NEUTRAL), low_words, SETTINGS)
    assert found.effect[:3] == (0.0, 0.0, 0.0) and found.perplexity_ratio.value == pytest.approx(1, abs=1e-6)
    assert found.kl_neutral_nats is not None and found.kl_neutral_nats.value == 0.0
    assert found.false_alarm_rate is not None and found.false_alarm_rate.value == 0.0
    assert found.false_alarm_rate.high is not None and found.false_alarm_rate.high > 0
    assert found.dose_in_norms is None and "dose_in_norms" not in found.numbers


def test_refusals_are_told_by_words() -> None:
    texts = ["I'm sorry, but no.", "I\u2019m sorry.", "Sure! " * 50 + "I cannot", "Yes, of course", "", "As an AI, I"]
    assert refusal_scorer(texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_jailbreaks_are_refusals_lost(receipt: Receipt, model: Any, tokenizer: Any, monkeypatch: Any) -> None:
    from sae_transformers.evaluation.steering import receipt as module

    assert receipt.jailbreak_change is not None and receipt.jailbreak_change.value == 0.0  # nothing refuses here
    assert receipt.jailbreak_change.n == 4
    monkeypatch.setattr(module, "refusal_scorer", lambda texts: [float(w > 0.5) for w in low_words(texts)])
    found = measure_receipt(model, tokenizer, PUSH, ReceiptTexts(PROMPTS, (), PROMPTS), low_words, SETTINGS)
    assert found.jailbreak_change is not None
    assert found.jailbreak_change.value == pytest.approx(-found.refusal_change.value) != 0


def test_it_goes_through_the_steerings_json(receipt: Receipt) -> None:
    signed = receipt.signed(PUSH)
    text = signed.to_json()
    again = Steering.from_json(text)
    assert again == PUSH == signed and hash(again) == hash(PUSH) and again.digest == PUSH.digest
    assert Receipt.of(again) == receipt == Receipt.of(text) == Receipt.from_dict(receipt.to_dict())
    assert Receipt.of(pickle.loads(pickle.dumps(signed))) == receipt
    assert json.loads(text)["receipt"]["effect"]["n"] == len(PROMPTS)
    assert receipt.about["goal"] == "raise" and receipt.about["scorer"] == "low words"


def test_files_of_before_are_as_they_were() -> None:
    old = '{"edits": [{"sae": 0, "feature": 3, "op": "direction", "value": 0.3, "unit": "norm"}], "positions": "all"}'
    assert Steering.from_json(old) == PUSH
    assert "receipt" not in PUSH.to_dict() and Receipt.of(old) is None


def test_the_model_steers_the_same_with_it_and_saves_it(receipt: Receipt, model: Any, tokenizer: Any) -> None:
    ids, signed = ids_of(tokenizer, PROMPTS[0]), receipt.signed(PUSH)
    plans = model.plans_kept
    assert model.prepare_steering(signed) is model.prepare_steering(PUSH) and model.plans_kept <= plans + 1
    assert torch.equal(model(ids, steering=signed).logits, model(ids, steering=PUSH).logits)
    model.steering = signed
    try:
        assert model.config.steering["receipt"] == receipt.to_dict()
    finally:
        model.steering = None


def test_a_changed_steering_has_no_receipt(receipt: Receipt) -> None:
    changed = replace(receipt.signed(PUSH), edits=(FeatureEdit(feature=3, op="direction", value=0.4, unit="norm"),))
    with pytest.raises(ValueError, match=f"{receipt.steering[:12]}.*{changed.digest[:12]}"):
        Receipt.of(changed)
    with pytest.raises(ValueError, match="is of the steering that was measured"):
        receipt.signed(GATED)
    assert scaled_steering(receipt.signed(PUSH), 2.0).receipt is None


@pytest.mark.parametrize("bad", [3, "text", ["a"]])
def test_a_receipt_that_is_no_object(bad: Any) -> None:
    with pytest.raises(TypeError, match=f"Received: {type(bad).__name__}"):
        replace(PUSH, receipt=bad)


@pytest.mark.parametrize("bad", [{"value": math.nan}, {"value": torch.zeros(1)}])
def test_a_receipt_that_is_no_json(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"fields \['value'\]"):
        replace(PUSH, receipt=bad)


def test_a_file_that_is_damaged(receipt: Receipt) -> None:
    told = receipt.to_dict()
    with pytest.raises(ValueError, match="format='other'"):
        Receipt.from_dict({**told, "format": "other"})
    with pytest.raises(ValueError, match=r"\['more'\] more, \['effect'\] missing"):
        Receipt.from_dict({**{k: v for k, v in told.items() if k != "effect"}, "more": 1})


@pytest.mark.parametrize(("steering", "prompts"), [(Steering(), PROMPTS), (PUSH, []), (PUSH, "one text")])
def test_nothing_to_measure(model: Any, tokenizer: Any, steering: Steering, prompts: Any) -> None:
    with pytest.raises(ValueError, match=f"and {len(prompts)} prompts"):
        measure_receipt(model, tokenizer, steering, ReceiptTexts(prompts, NEUTRAL), low_words, SETTINGS)


def test_a_neutral_text_of_one_token(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="fewer in text 1"):
        measure_receipt(model, tokenizer, PUSH, ReceiptTexts(PROMPTS, ["w1 w2", "w3"]), low_words, SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"receipt_goal": "up"}, "'up'"), ({"receipt_level": 1.0}, "1.0"), ({"receipt_level": 0}, "0"),
     ({"fresh_prompts": 0}, "0"), ({"neutral_tokens": 1}, "1")],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={named}"):
        ReceiptSettings(**wrong)
