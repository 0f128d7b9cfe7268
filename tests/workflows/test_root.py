"""What the root has: the verbs as functions, each in a few lines, from texts to a model that others load."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import sae_transformers
from sae_transformers import (
    HarvestSettings,
    HiddenStateShards,
    SparseAutoencoder,
    attach,
    convert,
    harvest,
    load,
    train,
)
from tests.create_training_data.words import word_texts, word_tokenizer
from tests.tiny import prompt, tiny_base

PLACE = "layers.1.resid_post"


def test_every_name_at_the_root_is_there():
    for name in sae_transformers.__all__:
        assert getattr(sae_transformers, name) is not None
    assert set(sae_transformers.__all__) <= set(dir(sae_transformers))


def test_from_texts_to_a_model_that_others_load(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = HarvestSettings((PLACE,), max_length=16, dtype="float32")
    found = harvest(base, word_tokenizer(), word_texts(40), tmp_path / "states", settings)
    assert found.complete and found.n_tokens == len(HiddenStateShards(tmp_path / "states"))
    again = harvest(base, word_tokenizer(), word_texts(40), tmp_path / "states", settings)
    assert again.new_tokens == 0 and again.n_tokens == found.n_tokens
    run = {"max_steps": 3, "per_device_train_batch_size": 64, "disable_tqdm": True, "use_cpu": True}
    sae = train(tmp_path / "states", hook_point=PLACE, sae={"d_sae": 64, "k": 8}, training=run).sae
    attach(str(tmp_path / "base"), [sae], tmp_path / "model")
    model, tokenizer, _ = load(tmp_path / "model")
    assert torch.equal(model(prompt()).logits, base(prompt()).logits)
    assert tokenizer.decode([11]) == "w7"
    assert torch.equal(model.saes[0].W_dec, sae.W_dec)
    assert convert(sae, tmp_path / "saelens", "saelens").difference < 1e-5
    read = SparseAutoencoder.from_pretrained(tmp_path / "saelens")
    torch.testing.assert_close(read.W_dec, sae.W_dec)
