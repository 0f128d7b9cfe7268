"""A feature as a reward: the score of the completion's own tokens, whatever the batch; and what keeps it honest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerControl, TrainerState

from sae_transformers import SaeForCausalLM
from sae_transformers.evaluation.canary import FEATURE, FeatureCanary
from sae_transformers.training.feature_reward import FeatureReward, FeatureRewardSettings
from tests.create_training_data.words import word_tokenizer
from tests.evaluation.test_canary import CONCEPT, LABELS, TEXTS, model_with_feature, texts_of
from tests.tiny import tiny_base, tiny_sae

PROMPTS = ["w20 w21", "w22 w23 w24 w25", "w26"]
COMPLETIONS = ["w1 w2 w3", "w30", "w4 w31 w5 w32"]


def frozen() -> Any:
    return model_with_feature().requires_grad_(False)


@pytest.fixture(scope="module")
def reader() -> Any:
    return frozen()


def reward_of(model: Any, canary: Any = None, **settings: Any) -> FeatureReward:
    options = FeatureRewardSettings(**settings)
    return FeatureReward(model, word_tokenizer(), feature=CONCEPT, canary=canary, settings=options)


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
@pytest.mark.parametrize("pre_activations", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_scores_are_those_of_the_completions_tokens(
    reader: Any, pooling: str, pre_activations: bool, tokens_per_batch: int
) -> None:
    tokenizer = word_tokenizer()
    reward = reward_of(reader, pooling=pooling, pre_activations=pre_activations, tokens_per_batch=tokens_per_batch)
    found = reward(PROMPTS, COMPLETIONS)
    for prompt, completion, got in zip(PROMPTS, COMPLETIONS, found, strict=True):
        ids = tokenizer(f"{prompt} {completion}", return_tensors="pt")["input_ids"]
        told = reader(input_ids=ids, features=[3], pre_activations=pre_activations).sae_features[0][0, :, 0]
        own = told[-len(completion.split()) :]
        wanted = {"mean": own.mean(), "max": own.max(), "last": own[-1]}[pooling]
        assert got == pytest.approx(float(wanted), abs=1e-5)


def test_ids_are_taken_as_they_were_generated(reader: Any) -> None:
    tokenizer = word_tokenizer()
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in COMPLETIONS]
    reward = reward_of(reader)
    assert reward(PROMPTS, ["?"] * 3, completion_ids=ids) == pytest.approx(reward(PROMPTS, COMPLETIONS), abs=1e-5)


def test_weight_and_conversations(reader: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
    )
    reward = FeatureReward(
        reader, tokenizer, feature=3, canary=None, settings=FeatureRewardSettings(weight=-2.0)
    )  # fmt: skip
    told = reward([[{"role": "user", "content": "w20"}]], [[{"role": "assistant", "content": "w1 w2"}]])
    assert told == pytest.approx([-2 * reward_of(reader)(["w20 w9"], ["w1 w2"])[0]], abs=1e-5)


def test_an_empty_completion_never_pays(reader: Any) -> None:
    texts = ["w1 w2 w3", "", "w40 w41"]
    found = reward_of(reader)(PROMPTS, texts)
    assert found[1] == min(found) and found[1] == found[2]
    assert reward_of(reader, empty=-9.0)(PROMPTS, texts)[1] == -9.0
    unwanted = reward_of(reader, weight=-1.0)(PROMPTS, texts)
    assert unwanted[1] == min(unwanted) == unwanted[0]
    assert bool(reward_of(reader).scores(PROMPTS, texts).isnan()[1])
    with pytest.raises(ValueError, match="Received: 2 empty completions"):
        reward_of(reader)(["w1", "w2"], ["", "</s>"])
    with pytest.raises(ValueError, match="Received: 2 prompts, 1 completions, None rows"):
        reward_of(reader)(["w1", "w2"], ["w3"])


def test_the_best_of_several(reader: Any) -> None:
    reward = reward_of(reader)
    some = [["w40 w41", "w1 w2 w3"], ["w5 w6", "w50", "w51 w52"]]
    assert reward.best(PROMPTS[:2], some) == [1, 0]
    with pytest.raises(ValueError, match=r"2 prompts, \[1, 0\] completions"):
        reward.best(PROMPTS[:2], [["w1"], []])


def test_a_reader_that_is_trained_is_refused_and_an_adapter_is_not_read(reader: Any) -> None:
    with pytest.raises(ValueError, match="learn to read what it writes"):
        reward_of(model_with_feature().requires_grad_(True))
    model = get_peft_model(frozen(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    assert reward_of(model)(PROMPTS, COMPLETIONS) == pytest.approx(reward_of(reader)(PROMPTS, COMPLETIONS), abs=1e-5)
    with pytest.raises(ValueError, match=r"1 SAE\(s\)"):
        FeatureReward(reader, word_tokenizer(), feature=3, sae=1, canary=None)
    with pytest.raises(ValueError, match="No concept or feature of that name"):
        FeatureReward(reader, word_tokenizer(), feature="joy", canary=None)
    with pytest.raises(ValueError, match="`pooling` must be one of"):
        FeatureRewardSettings(pooling="sum")


# -- the canary ------------------------------------------------------------------------------------------------------


def mistaken(reader: Any) -> Any:
    """The reader with an encoder that reads a direction of w55's states, too, in which the probes see nothing."""
    model = frozen()
    tokenizer = word_tokenizer()
    with torch.no_grad():
        ids = tokenizer("w20 w55 w55 w55 w55", return_tensors="pt")["input_ids"]
        state = reader(input_ids=ids, output_sae_inputs=True).sae_inputs[0][0, 1:].mean(0)
        rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
        usual = torch.cat([reader(input_ids=row, output_sae_inputs=True).sae_inputs[0][0, 1:] for row in rows])
        towards = state - usual.mean(0)
        column = model.saes[0].W_enc[:, 3]
        towards = towards - (towards @ column) / (column @ column) * column
        model.saes[0].W_enc[:, 3] = column + 3.0 * towards / towards.square().sum() * float((usual @ column).std())
    return model


def test_texts_that_please_the_feature_alone_bring_the_canary_down(reader: Any) -> None:
    model = mistaken(reader)
    canary = FeatureCanary(model, word_tokenizer(), TEXTS, LABELS, feature=CONCEPT)
    plain, concept, trick = texts_of(0, 16, 11), texts_of(1, 16, 12), [" ".join(["w55"] * 6)] * 16
    for texts, falls in ((concept, False), (trick, True)):
        reward = reward_of(model, canary, window=16)
        reward.callback.on_train_begin(None, TrainerState(), TrainerControl())
        reward(["w20"] * 16, plain)
        assert not reward.reasons
        first = reward.numbers()[f"canary_completions/{FEATURE}"]
        reward(["w20"] * 16, texts)
        assert reward.numbers()[f"canary_completions/{FEATURE}"] > first + 0.5
        assert bool(reward.reasons) is falls, reward.reasons
        control = TrainerControl()
        reward.callback.on_step_end(None, TrainerState(), control)
        assert control.should_training_stop is falls
        logs: dict[str, float] = {}
        reward.callback.on_log(None, TrainerState(), control, logs=logs)
        assert set(logs) == {f"canary_completions/{name}" for name in canary.before.presence}


def test_a_fallen_canary_is_of_one_training_and_adapters_do_not_sing(reader: Any) -> None:
    model = mistaken(reader)
    canary = FeatureCanary(model, word_tokenizer(), TEXTS, LABELS, feature=CONCEPT)
    tuned = get_peft_model(mistaken(reader), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    texts, found = texts_of(0, 8, 11), []
    for one in (model, tuned):
        reward = reward_of(one, canary, window=8)
        reward.callback.on_train_begin(None, TrainerState(), TrainerControl())
        reward(["w20"] * 8, texts)
        found.append(reward.numbers())
        reward(["w20"] * 8, [" ".join(["w55"] * 6)] * 8)
        assert reward.reasons
        reward.callback.on_train_begin(None, TrainerState(), TrainerControl())
        assert not reward.reasons and not reward.numbers()
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_canary_that_nothing_heeds_is_an_error(reader: Any) -> None:
    model = mistaken(reader)
    canary = FeatureCanary(model, word_tokenizer(), TEXTS, LABELS, feature=CONCEPT)
    reward = reward_of(model, canary, window=8)
    reward(["w20"] * 8, texts_of(0, 8, 11))
    with pytest.raises(RuntimeError, match="Give `reward.callback` to the trainer"):
        reward(["w20"] * 8, [" ".join(["w55"] * 6)] * 8)


def test_its_name_tells_rewards_apart() -> None:
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=0), tiny_sae(layer=1)])
    names = {
        FeatureReward(model, word_tokenizer(), feature=feature, sae=sae, canary=None).__name__
        for feature in (1, 2)
        for sae in (0, 1)
    }
    assert len(names) == 4
