"""Penalties in TRL's `SFTTrainer`: the loss of our own forward pass, padded and packed, resumed bit for bit.

Needs SAE_TRANSFORMERS_TRL, a folder with TRL: `python benchmarks/peers.py trl` makes it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer

from sae_transformers import FeaturePenalty, SaeForCausalLM, log_loss_terms
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import tiny_base, tiny_sae

PACKAGES = os.environ.get("SAE_TRANSFORMERS_TRL", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PACKAGES, reason="no folder with TRL"),
    pytest.mark.filterwarnings("default"),  # TRL's own
]


@pytest.fixture(scope="module")
def trl() -> Any:
    sys.path.append(PACKAGES)
    import trl  # pyright: ignore[reportMissingImports]

    return trl


PENALTIES = [FeaturePenalty([3, 40], weight=0.5, name="calm"), FeaturePenalty(7, over="all", of="share", goal="zero")]


def trained(trl: Any, folder: Path, *, resume: str | None = None, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    """Two steps of a LoRA, the trainable parameters and the logged terms."""

    class LossOfTheModel(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    torch.manual_seed(0)
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], feature_penalties=PENALTIES)
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=0.02, save_steps=1,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, seed=1,
        gradient_checkpointing=options.pop("gradient_checkpointing", False), **options,
    )  # fmt: skip
    trainer = LossOfTheModel(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"text": word_texts(16)}),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]),
    )
    log_loss_terms(trainer)
    trainer.train(resume_from_checkpoint=resume)
    logged = [one for one in trainer.state.log_history if "penalty_calm" in one]
    inner: Any = trainer.model
    return {n: p.detach().clone() for n, p in inner.named_parameters() if p.requires_grad}, logged


PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize("options", [{}, PADDING_FREE, {"gradient_checkpointing": True}], ids=str)
def test_two_steps_of_a_lora_in_sft_trainer(trl: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    whole, logged = trained(trl, tmp_path / "whole", **options)
    assert len(logged) == 2 and all(one["penalty_calm"] > 0 and one["penalty_1"] > 0 for one in logged)
    plain, padded = trained(trl, tmp_path / "plain")
    for name, value in plain.items():
        torch.testing.assert_close(whole[name], value, rtol=2e-3, atol=2e-4)
    for one, other in zip(logged, padded, strict=True):
        assert one["penalty_calm"] == pytest.approx(other["penalty_calm"], rel=1e-3)
    again, _ = trained(trl, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-1"), **options)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_the_loss_is_that_of_a_plain_loop(trl: Any, tmp_path: Path) -> None:
    found, _ = trained(trl, tmp_path, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    moved = [value for name, value in found.items() if "lora_B" in name]
    assert moved and all(value.any() for value in moved[:4])


def test_without_the_models_own_loss_it_fails_aloud(trl: Any, tmp_path: Path) -> None:
    """TRL 1.16 scores the body's last hidden state past the model's forward pass: no penalty would be in its loss."""
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1)], feature_penalties=PENALTIES)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"text": word_texts(16)}),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    )
    with pytest.raises(Exception, match="compute_loss = Trainer.compute_loss"):
        trainer.train()
