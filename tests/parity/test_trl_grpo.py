"""`FeatureReward` in TRL's `GRPOTrainer`: what it rewards comes more often, and the canary ends what only pleases it.

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

from sae_transformers.evaluation.canary import FeatureCanary
from sae_transformers.training.feature_reward import FeatureReward, FeatureRewardSettings
from tests.create_training_data.words import word_tokenizer
from tests.evaluation.test_canary import CONCEPT, LABELS, TEXTS, model_with_feature
from tests.training.test_feature_reward import frozen, mistaken

PACKAGES = os.environ.get("SAE_TRANSFORMERS_TRL", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PACKAGES, reason="no folder with TRL"),
    pytest.mark.filterwarnings("default"),  # TRL's own
]
PROMPTS = [f"w{20 + n} w{30 + n}" for n in range(8)]


@pytest.fixture(scope="module")
def trl() -> Any:
    sys.path.append(PACKAGES)
    import trl  # pyright: ignore[reportMissingImports]

    return trl


def trained(trl: Any, folder: Path, reward: FeatureReward, steps: int) -> Any:
    """A policy of the reader's base, trained by the reward alone."""
    torch.manual_seed(0)
    policy = model_with_feature().lm.requires_grad_(True)
    policy.generation_config.eos_token_id = None
    arguments = trl.GRPOConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=16, num_generations=8, learning_rate=0.01,
        max_completion_length=6, report_to="none", use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True,
        seed=1, beta=0.0, gradient_checkpointing=False, temperature=1.0,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        policy,
        reward_funcs=[reward],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=word_tokenizer(),
        callbacks=[reward.callback],
    )
    trainer.train()
    return trainer


def test_twenty_steps_raise_the_rate_of_the_feature(trl: Any, tmp_path: Path) -> None:
    reward = FeatureReward(frozen(), word_tokenizer(), feature=CONCEPT, canary=None)
    history = trained(trl, tmp_path, reward, 20).state.log_history
    means = [row[f"rewards/{reward.__name__}/mean"] for row in history if f"rewards/{reward.__name__}/mean" in row]
    assert len(means) == 20
    first, last = sum(means[:3]) / 3, sum(means[-3:]) / 3
    spread = max(row[f"rewards/{reward.__name__}/std"] for row in history[:3])
    assert last > first + 4 * spread * (2 / 48) ** 0.5, means  # 48 samples each


def test_it_stops_when_the_canary_falls(trl: Any, tmp_path: Path) -> None:
    reader = mistaken(frozen())
    canary = FeatureCanary(reader, word_tokenizer(), TEXTS, LABELS, feature=CONCEPT)
    options = FeatureRewardSettings(window=32)
    reward = FeatureReward(reader, word_tokenizer(), feature=CONCEPT, canary=canary, settings=options)
    trainer = trained(trl, tmp_path, reward, 60)
    assert reward.reasons and trainer.state.global_step < 60
    assert any("canary_completions/feature" in row for row in trainer.state.log_history)
