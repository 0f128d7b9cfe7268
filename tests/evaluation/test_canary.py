"""The canary: probes that nothing is trained against, beside a feature that something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sae_transformers import FeaturePenalty, SaeForCausalLM, fit_diffmean
from sae_transformers.evaluation.canary import FEATURE, CanarySettings, FeatureCanary
from sae_transformers.latents.hidden_states import read_hidden_states
from sae_transformers.training.canary_callback import watch_canary
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

CONCEPT = "anger"


def texts_of(kind: int, count: int, seed: int) -> list[str]:
    """Random words, which with the concept are of the first ten."""
    words = torch.randint(
        1 if kind else 11, 11 if kind else 60, (count, 9), generator=torch.Generator().manual_seed(seed)
    )
    return [" ".join(f"w{word}" for word in row) for row in words.tolist()]


TEXTS = texts_of(1, 32, 0) + texts_of(0, 32, 1)
LABELS = [1] * 32 + [0] * 32


def model_with_feature(penalty: FeaturePenalty | None = None) -> Any:
    """A base in which the concept's words share a part, and whose SAE reads that along DiffMean."""
    base = tiny_base()
    with torch.no_grad():
        base.model.embed_tokens.weight[5:15] += 0.15 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    sae = tiny_sae(layer=0, activation="relu", concepts={CONCEPT: 3}, feature_names={"3": CONCEPT})
    model = SaeForCausalLM.from_base(base, [sae], weights_scope="full", feature_penalties=penalty)
    states = read_hidden_states(model, word_tokenizer(), TEXTS)
    labels = torch.tensor(LABELS)[states.text_index]
    direction = fit_diffmean(states.hidden, labels)
    with torch.no_grad():
        sae.W_enc[:, 3] = direction / direction.norm()
        sae.W_dec[3] = direction / direction.norm()
    return model.eval()


@pytest.fixture(scope="module")
def canary() -> FeatureCanary:
    return FeatureCanary(model_with_feature(), word_tokenizer(), TEXTS, LABELS, feature=CONCEPT)


def test_of_the_model_as_it_was_it_says_so(canary: FeatureCanary) -> None:
    assert canary.probe_places == ["layers.0.resid_post", "layers.1.resid_post"]
    before = canary.before
    assert set(before.presence) == {FEATURE, "probe at layers.0.resid_post", "probe at layers.1.resid_post"}
    for value in before.presence.values():
        assert 0.5 < value < 1.5
    assert all(value > 0.8 for value in [*before.aurocs.values(), *before.new_aurocs.values()])
    assert before.sae_drift == 0 and before.loss_recovered is not None and before.explained_variance is not None
    model = model_with_feature().train()
    assert canary.measure(model) == before and model.training and model.lm.training
    assert canary.fallen(before) == []
    assert {name.partition("/")[0] for name in before.numbers()} == {
        "canary_sae_drift", "canary_explained_variance", "canary_loss_recovered", "canary_presence", "canary_aurocs",
        "canary_new_aurocs",
    }  # fmt: skip


def test_scores_of_other_texts_are_on_the_same_scale(canary: FeatureCanary) -> None:
    found = canary.scores(model_with_feature(), texts_of(1, 20, 7) + texts_of(0, 20, 8))
    for name, values in found.items():
        assert values.shape == (40,)
        assert values[:20].mean() > 0.5 > values[20:].mean() + 0.2, name


def test_of_a_transcoder_it_is_the_variance_of_what_the_mlp_gives() -> None:
    """One that gives its MLP's output, by a linear part that was fitted, with the concept on top."""
    base, tokenizer = tiny_base(), word_tokenizer()
    with torch.no_grad():
        base.model.embed_tokens.weight[5:15] += 0.15 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    place: dict[str, Any] = {"hook": "model.layers.0.mlp.input", "hook_out": "model.layers.0.mlp"}
    coder = tiny_sae(activation="relu", skip_connection=True, apply_b_dec_to_input=False, **place)
    seen: dict[str, list[torch.Tensor]] = {"read": [], "given": []}
    mlp = base.model.layers[0].mlp

    def keep(_: Any, args: Any, out: torch.Tensor) -> None:
        seen["read"].append(args[0])
        seen["given"].append(out)

    handle = mlp.register_forward_hook(keep)
    with torch.no_grad():
        for text in TEXTS:
            base(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    read, given = (torch.cat([one[0, 1:] for one in seen[name]]) for name in ("read", "given"))
    with torch.no_grad():
        coder.W_dec.mul_(0.01)
        coder.b_dec.zero_()
        coder.W_skip.copy_(torch.linalg.lstsq(read, given).solution.T)
    model = SaeForCausalLM.from_base(base, [coder], weights_scope="full").eval()
    canary = FeatureCanary(model, tokenizer, TEXTS, LABELS, feature=3)
    before = canary.before.explained_variance
    assert before is not None and canary.before.loss_recovered is None
    of_half = torch.cat([torch.full((len(tokenizer(t)["input_ids"]) - 1,), i) for i, t in enumerate(TEXTS)])
    kept = torch.isin(of_half, canary.measuring)
    with torch.no_grad():
        left = given[kept] - coder(read[kept]).reconstruction
    expected = 1 - float(left.square().sum() / (given[kept] - given[kept].mean(0)).square().sum())
    assert before == pytest.approx(expected, abs=1e-4) and before > 0.3
    assert canary.fallen(canary.before) == []
    with torch.no_grad():
        mlp.down_proj.weight.mul_(-1.0)
    (reason,) = [one for one in canary.fallen(canary.measure(model)) if "variance" in one]
    assert f"before it was {before:.3f}" in reason
    assert "canary_explained_variance" in canary.before.numbers()


def hidden_from_the_sae(model: Any) -> Any:
    """Whatever writes to the states at the SAE writes a little against its encoder column, and all else as before."""
    column = model.saes[0].W_enc[:, 3].detach()
    column = column / column.norm()
    block = model.lm.model.layers[0]
    with torch.no_grad():
        weight = model.get_parameter("lm.model.embed_tokens.weight")
        weight -= 1.2 * (weight @ column)[:, None] * column
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight -= 1.2 * column[:, None] * (column @ weight)
    return model


def test_a_feature_that_was_hidden_from_the_sae_alone_fells_it(canary: FeatureCanary) -> None:
    model = hidden_from_the_sae(model_with_feature())
    reading = canary.measure(model)
    assert reading.aurocs[FEATURE] < 0.5 and max(reading.new_aurocs.values()) > 0.95
    reasons = canary.fallen(reading)
    assert any("a new probe on the same states" in reason for reason in reasons)


def test_an_sae_that_was_moved_shows(canary: FeatureCanary) -> None:
    model = model_with_feature()
    with torch.no_grad():
        model.saes[0].W_dec[3] *= 2
        model.saes[0].b_dec += 3.0
    reading = canary.measure(model)
    assert reading.sae_drift > 0.1
    assert any("explains" in reason for reason in canary.fallen(reading))


def test_a_second_feature_reads_beside(canary: FeatureCanary) -> None:
    model = model_with_feature()
    settings = CanarySettings(second=(0, 17), later="layers.2.resid_post", with_loss=False, pre_activations=False)
    other = FeatureCanary(model, word_tokenizer(), TEXTS, LABELS, feature=3, settings=settings)
    assert list(other.before.presence) == [
        FEATURE, "second feature", "probe at layers.0.resid_post", "probe at layers.2.resid_post",
    ]  # fmt: skip
    assert other.before.loss_recovered is None


def test_trainer_logs_it_and_stops_where_it_falls(tmp_path: Any) -> None:
    penalty = FeaturePenalty(CONCEPT, weight=0.0, name=CONCEPT)
    model = model_with_feature(penalty)
    limits = CanarySettings(most_variance_lost=0.0, most_apart=0.0, with_loss=False)
    rows = [{"input_ids": ids, "labels": ids} for ids in word_tokenizer()(TEXTS)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=6, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    watched = FeatureCanary(model, word_tokenizer(), TEXTS, LABELS, feature=CONCEPT, settings=limits)
    callback = watch_canary(trainer, watched, every=2)
    with pytest.warns(UserWarning, match="The canary has fallen at step 2: .* Training stops here"):
        trainer.train()
    assert trainer.state.global_step == 2 and [step for step, _ in callback.readings] == [2]
    assert callback.reasons and callback.reasons == watched.fallen(callback.readings[0][1])
    (logged,) = [record for record in trainer.state.log_history if "canary_presence/feature" in record]
    assert logged["canary_presence/feature"] == round(callback.readings[0][1].presence[FEATURE], 6)
    assert model.training


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": LABELS[:-1]}, "64 texts"),
        ({"labels": [1] * 60 + [0] * 4}, "4 labels 0"),
        ({"labels": [2] * 64}, "0 labels 0 and 0 labels 1 of 64"),
        ({"feature": "joy"}, "feature='joy'"),
        ({"sae": 1}, "sae=1"),
        ({"settings": CanarySettings(second=(4, 3))}, "second=4"),
    ],
)
def test_bad_input_is_told(change: dict, told: str) -> None:
    given: dict[str, Any] = {"texts": TEXTS, "labels": LABELS, "feature": CONCEPT, **change}
    with pytest.raises(ValueError, match=told):
        FeatureCanary(model_with_feature(), word_tokenizer(), given.pop("texts"), given.pop("labels"), **given)


def test_what_cannot_be_read_is_told(canary: FeatureCanary) -> None:
    with pytest.raises(ValueError, match="Received: LlamaForCausalLM"):
        canary.measure(tiny_base())
    with pytest.raises(ValueError, match="two tokens or more"):
        canary.scores(model_with_feature(), ["w1"])
    with pytest.raises(ValueError, match="most_apart=-1"):
        CanarySettings(most_apart=-1)
    with pytest.raises(ValueError, match="every=0"):
        watch_canary(None, canary, every=0)  # pyright: ignore[reportArgumentType]
