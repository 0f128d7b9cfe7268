"""transformers reports weights that a checkpoint lacks; those of a head that is not used are no such weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification
from tests.tiny import tiny_base, tiny_sae


@pytest.fixture
def reported() -> Iterator[list[str]]:
    """What transformers logs, from warnings on."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, before = Keep(logging.WARNING), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(handler)
    yield messages
    transformers.logging.remove_handler(handler)
    transformers.logging.set_verbosity(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_feature_head_makes_no_report_of_the_head_that_is_not_used(
    base: Path, tmp_path: Path, reported: list[str]
) -> None:
    sae, settings = tiny_sae(layer=1), {"sae": 0}
    model = SaeForSequenceClassification.from_base(base, saes=[sae], feature_head=settings)
    assert reported == []
    model.save_pretrained(tmp_path / "saved")
    again = SaeForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert reported == []
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)
    loaded, info = SaeForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert info["missing_keys"] == set() and loaded.feature_head is not None


def test_a_head_that_is_used_and_new_is_reported(base: Path, tmp_path: Path, reported: list[str]) -> None:
    model = SaeForSequenceClassification.from_base(base, saes=[tiny_sae(layer=1)])
    assert len(reported) == 1 and "score.weight" in reported[0]
    model.save_pretrained(tmp_path / "saved")  # with that head
    del reported[:]
    SaeForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert reported == []


def test_other_weights_that_lack_are_reported_all_the_same(base: Path, reported: list[str]) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    SaeForSequenceClassification.from_base(base, saes=[tiny_sae(layer=1)], feature_head={"sae": 0})
    assert len(reported) == 1 and "up_proj" in reported[0]
    SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)])
    assert len(reported) == 2
