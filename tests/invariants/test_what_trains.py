"""Fine-tuning by `Trainer` and PEFT: what would train nothing, or something else, or be lost, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification, SaeModel
from tests.tiny import prompt, tiny_base, tiny_sae

EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}


def classifier(tmp_path: Path, **settings: Any) -> SaeForSequenceClassification:
    tiny_base().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    return SaeForSequenceClassification.from_base(base, [tiny_sae(layer=1)], **settings)


TEXTS = {"input_ids": prompt(), "labels": prompt()}
LABELLED = {"input_ids": prompt(), "labels": torch.tensor([0, 1])}


def fit(model: Any, tmp_path: Path, rows: dict[str, torch.Tensor] = TEXTS) -> Any:
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True, learning_rate=0.05,
    )  # fmt: skip
    data: Any = [{name: value[n] for name, value in rows.items()} for n in range(2)]
    return Trainer(model, arguments, train_dataset=data).train()


# -- LoRA and the feature head ----------------------------------------------------------------------------------------


def test_lora_that_would_train_the_bases_own_head_is_refused(tmp_path: Path) -> None:
    lora = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"]}
    wrong = get_peft_model(classifier(tmp_path, feature_head={"sae": 0}), LoraConfig(**lora))
    with pytest.raises(ValueError, match=r"modules_to_save=\['feature_head'\].* Received: trainable lm.score"):
        fit(wrong, tmp_path, LABELLED)
    wrong.eval()
    wrong(**LABELLED)  # measuring is allowed


def test_lora_with_the_feature_head_trains_it(tmp_path: Path) -> None:
    model = classifier(tmp_path, feature_head={"sae": 0})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["feature_head"])
    trained = get_peft_model(model, lora)
    fit(trained, tmp_path, LABELLED)
    head: Any = model.feature_head.modules_to_save["default"]  # pyright: ignore
    assert not torch.equal(head.linear.weight, before["feature_head.linear.weight"])
    merged: Any = trained.merge_and_unload()
    torch.testing.assert_close(merged.saes[0].W_enc, before["saes.0.W_enc"], **EXACT)


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unintended", "unintended_state"])
def test_losses_of_another_head_are_refused(name: str, tmp_path: Path) -> None:
    weights = {"lm": 1.0, name: 100.0}
    with pytest.raises(ValueError, match=rf"SaeForCausalLM may have lm, .*Received: {name}=100.0.*feature_head="):
        SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], loss_weights=weights)
    with pytest.raises(ValueError, match=f"SaeForSequenceClassification may have lm, .*{name}=100.0.*feature_head="):
        classifier(tmp_path, loss_weights=weights)
    classifier(tmp_path, loss_weights=weights, feature_head={"sae": 0})
    with pytest.raises(ValueError, match="SaeModel may have none. Received: sparsity=1.0"):
        SaeModel.from_base(tiny_base(), [tiny_sae(layer=1)], loss_weights={"sparsity": 1.0})
    with pytest.raises(ValueError, match="aux"):
        SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], loss_weights={"aux": 1.0})


def test_a_model_loads_as_another_head_whatever_it_was_trained_by(tmp_path: Path) -> None:
    """What another head has no use for is refused where it is typed, not where a published model is loaded."""
    tiny_base().save_pretrained(tmp_path / "base")
    trained = SaeForCausalLM.from_base(str(tmp_path / "base"), [tiny_sae(layer=1)], loss_weights={"sparsity": 1.0})
    trained.save_pretrained(tmp_path / "trained")
    assert SaeModel.from_pretrained(tmp_path / "trained")(prompt()).last_hidden_state.shape == (*prompt().shape, 32)
    scored = classifier(tmp_path, loss_weights={"unintended": 1.0}, feature_head={"sae": 0})
    scored.save_pretrained(tmp_path / "scored")
    loaded = SaeForCausalLM.from_pretrained(tmp_path / "scored")
    torch.testing.assert_close(loaded.saes[0].W_enc, scored.saes[0].W_enc, **EXACT)


def test_a_loss_that_trains_nothing_says_what_would(tmp_path: Path) -> None:
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)])
    with pytest.raises(ValueError, match=r"weights_scope='full'.*get_peft_model.*the base frozen"):
        fit(model, tmp_path)
    concepts = tiny_sae(layer=1, concepts={"joy": 0})
    model = SaeForCausalLM.from_base(tiny_base(), [concepts], loss_weights={"lm": 0.0, "conditioning": 1.0})
    with pytest.raises(ValueError, match="Pass `concept_targets` with the batch"):
        fit(model, tmp_path)
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], loss_weights={"reconstruction": 1.0})
    model.saes.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model.saes.requires_grad_\(True\)"):
        fit(model, tmp_path)
    with torch.no_grad():
        assert model.train()(**TEXTS).loss > 0
    assert model.eval()(**TEXTS).loss > 0


@pytest.mark.parametrize(
    "options", [{"weights_scope": "full"}, {"loss_weights": {"reconstruction": 1.0}}], ids=["base", "saes"]
)
def test_what_trains_trains(options: dict, tmp_path: Path) -> None:
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], **options)
    assert fit(model, tmp_path).training_loss > 0


# -- a base that changed ----------------------------------------------------------------------------------------------


def lora_merged(model: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=False)
    lora = get_peft_model(model, config)
    merged: Any = lora.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return merged


def test_a_merged_lora_is_saved_in_full_or_not_at_all(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    model = lora_merged(SaeForCausalLM.from_base(str(tmp_path / "base"), [tiny_sae(layer=1)]))
    expected = model.eval()(prompt()).logits
    assert (expected - tiny_base()(prompt()).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"3 changed .*v_proj.weight.*weights_scope = 'full'"):
        model.save_pretrained(tmp_path / "model")
    model.config.weights_scope = "full"
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(SaeForCausalLM.from_pretrained(tmp_path / "model")(prompt()).logits, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_that_was_only_rounded_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    model = SaeForCausalLM.from_base(str(tmp_path / "base"), [tiny_sae(layer=1)])
    model.lm.to(dtype)
    model.save_pretrained(tmp_path / "rounded")
    model.lm.to(torch.float32)
    model.save_pretrained(tmp_path / "back")
    loaded = SaeForCausalLM.from_pretrained(tmp_path / "back")
    with pytest.raises(ValueError, match="is not what it was"):
        lora_merged(loaded).save_pretrained(tmp_path / "again")


# -- SCAR's way -------------------------------------------------------------------------------------------------------


def test_scars_fields_at_loading(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    model = SaeForCausalLM.from_base(str(tmp_path / "base"), [tiny_sae(layer=1)]).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SaeForCausalLM.from_pretrained(tmp_path / "model", mod_features=3, mod_scaling=-40.0)
    model.hook.mod_features, model.hook.mod_scaling = 3, -40.0
    assert loaded.steering == model.steering and loaded.hook.mod_scaling == -40.0
    torch.testing.assert_close(loaded(prompt()).logits, model(prompt()).logits, **EXACT)
    assert not torch.equal(loaded(prompt()).logits, loaded(prompt(), steering=False).logits)
    with pytest.raises(ValueError, match="64"):
        SaeForCausalLM.from_pretrained(tmp_path / "model", mod_features=64)


def test_pop_gives_the_hidden_state_before_the_edit_once() -> None:
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)]).eval()
    model(prompt())
    with pytest.raises(ValueError, match="a pass since the first use of `model.hook`"):
        model.hook.pop()
    plain = model(prompt(), output_sae_inputs=True, steering=False).sae_inputs[0]
    model.hook.set(mod_scaling=-40.0, mod_features=3)
    model(prompt())
    popped = model.hook.pop()
    torch.testing.assert_close(popped, plain, **EXACT)
    assert not popped.requires_grad
    with pytest.raises(ValueError, match="Received: none"):
        model.hook.pop()
    model.generate(prompt(), max_new_tokens=3, do_sample=False)
    assert model.hook.pop().shape == (2, 1, 32)  # of the last token
    with pytest.raises(AttributeError, match="mod_scale"):
        model.hook.set(mod_scale=1.0)
