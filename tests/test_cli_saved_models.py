"""Models that save_pretrained wrote, as the verbs read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SaeForCausalLM
from sae_transformers.workflows.loading import load, this_device
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

pytestmark = pytest.mark.usefixtures("command_line")


def test_each_of_several_processes_has_the_gpu_of_its_local_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SaeForCausalLM.from_base(
        tiny_base(vocab_size=94), saes=[tiny_sae(layer=1, site="resid_post")], weights_scope="full"
    )
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert this_device() == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved: list[str] = []
    monkeypatch.setattr(SaeForCausalLM, "to", lambda self, device: moved.append(device) or self)
    for rank in (None, "3"):
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        load(tmp_path, model_dtype="float32")
    assert moved == ["cuda:0", "cuda:3"]
