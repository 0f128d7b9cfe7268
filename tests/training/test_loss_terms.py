"""The terms that are logged add up to the loss that is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification, log_loss_terms
from tests.tiny import tiny_base, tiny_sae

IDS = torch.randint(3, 99, (8, 9), generator=torch.Generator().manual_seed(0))


class Seen(TrainerCallback):
    """What a reporter such as TensorBoard gets."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def fit(model: Any, rows: dict[str, torch.Tensor], folder: Path) -> tuple[Trainer, list[dict]]:
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=2,
        report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    data: Any = [{name: value[n] for name, value in rows.items()} for n in range(len(IDS))]
    seen = Seen()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[seen])
    log_loss_terms(trainer)
    trainer.train()
    return trainer, [log for log in seen.logs if "loss" in log]


@pytest.mark.parametrize("lora", ["no", "yes", "without hooks"])
def test_terms_of_a_language_model_add_up(lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lora == "without hooks":  # as PEFT before 0.21
        monkeypatch.setattr(BaseTuner, "forward", lambda tuner, *args, **kwargs: tuner.model.forward(*args, **kwargs))
    weights = {"lm": 1.0, "reconstruction": 0.5, "sparsity": 0.1}
    model: Any = SaeForCausalLM.from_base(
        tiny_base(), [tiny_sae(layer=1)], loss_weights=weights, weights_scope="full", detach_hidden=False
    )
    if lora != "no":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    trainer, logs = fit(model, {"input_ids": IDS, "labels": IDS}, tmp_path)
    assert len(logs) == 2
    for log in logs:
        total = log["lm_loss"] + 0.5 * log["reconstruction"] + 0.1 * log["sparsity"]
        assert total == pytest.approx(log["loss"], abs=2e-4)
    assert [record["sparsity"] for record in trainer.state.log_history if "sparsity" in record] == [
        log["sparsity"] for log in logs
    ]
    assert logs[0]["reconstruction"] != logs[1]["reconstruction"]


def test_terms_of_a_classifier_add_up(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    model = SaeForSequenceClassification.from_base(
        base, [tiny_sae(layer=1)], feature_head={"sae": 0}, loss_weights={"unintended": 3.0}
    )
    model.set_unintended([3, 9])
    _, logs = fit(model, {"input_ids": IDS, "labels": torch.arange(8) % 2}, tmp_path / "run")
    for log in logs:
        assert log["unintended"] > 0
        assert log["lm_loss"] + 3 * log["unintended"] == pytest.approx(log["loss"], abs=2e-4)


def test_a_model_without_saes_has_no_terms(tmp_path: Path) -> None:
    trainer = Trainer(tiny_base(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    with pytest.raises(ValueError, match="Received: a trainer of LlamaForCausalLM"):
        log_loss_terms(trainer)
