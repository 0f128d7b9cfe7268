"""From text to a trained SAE by both ways, shards and a stream; and a stream's training stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback

from sae_transformers import (
    HiddenStateShards,
    SaeTrainer,
    SaeTrainingArguments,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from sae_transformers.create_training_data.harvest.blocks import HarvestSettings
from sae_transformers.create_training_data.harvest.store import harvest_to_store
from sae_transformers.create_training_data.harvest.stream import HiddenStateStream
from sae_transformers.latents.texts import rows_of_list
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import WIDTH, tiny_base

PLACE = "layers.1.resid_post"
SETTINGS = HarvestSettings(hook_points=(PLACE,), max_length=16, rows_per_shard=4, dtype="float32")


def labelled(count: int = 40) -> Any:
    return rows_of_list(word_texts(count), {"anger": [i % 2 for i in range(count)]})


def new_stream() -> HiddenStateStream:
    return HiddenStateStream(tiny_base(), word_tokenizer(), labelled(), SETTINGS, batch_tokens=16, window_blocks=2)


def new_trainer(out: Path, data: Any, steps: int, stop: int | None = None) -> SaeTrainer:
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(d_in=WIDTH, d_sae=48, activation="topk", k=4, layer=1, concepts={"anger": 5})
    args = SaeTrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        init_tokens=40,
        save_steps=stop or steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SaeTrainer(SparseAutoencoder(config), args, data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_shards_of_a_harvest_are_what_training_reads(tmp_path):
    store = tmp_path / "states"
    harvest_to_store(tiny_base(), word_tokenizer(), labelled(), SETTINGS, store)
    states = HiddenStateShards(store)
    assert (states.widths, states.label_names) == ({PLACE: WIDTH}, ["anger"])
    trainer = new_trainer(tmp_path / "out", states, steps=20)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()
    assert torch.isfinite(torch.tensor(losses)).all()
    sae, saved = trainer.saes[0], SparseAutoencoder.from_pretrained(tmp_path / "out")
    hidden = states.__getitems__(torch.arange(len(states)))[PLACE]
    assert torch.equal(saved(hidden).reconstruction, sae(hidden).reconstruction)
    fresh = SparseAutoencoder(sae.config)
    assert saved.losses(hidden)["reconstruction"] < 0.8 * fresh.losses(hidden)["reconstruction"]


@pytest.mark.parametrize("stop", [3, 12])  # in the first window, and after some
def test_a_stream_stopped_and_resumed_trains_the_same(tmp_path, stop):
    whole = new_trainer(tmp_path / "whole", new_stream(), steps=15)
    whole.train()
    new_trainer(tmp_path / "part", new_stream(), steps=15, stop=stop).train()
    resumed = new_trainer(tmp_path / "part", new_stream(), steps=15)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop}"))
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole.train_dataset.state_dict() == resumed.train_dataset.state_dict()  # pyright: ignore
