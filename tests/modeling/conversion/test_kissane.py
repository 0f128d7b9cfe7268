"""Kissane's attention SAEs of GPT-2, against their formula. There is no golden file of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, write_json

RUN = "gpt2-small_L7_Hcat_z_lr1.20e-03_v9"
SAID = {"act_size": D, "dict_size": F, "act_name": "blocks.7.attn.hook_z"}


def write(folder: Path, said: dict[str, Any] | None = SAID, **changes: Any) -> dict[str, torch.Tensor]:
    tensors = random(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,))
    torch.save({**tensors, **changes}, folder / f"{RUN}.pt")
    if said is not None:
        write_json(folder / f"{RUN}_cfg.json", said)
    return {name: value.double() for name, value in tensors.items()}


@pytest.mark.parametrize("said", [SAID, None])
def test_formula(tmp_path: Path, said: dict[str, Any] | None) -> None:
    t = write(tmp_path, said)
    sae = SparseAutoencoder.from_pretrained(tmp_path, sae_id=f"{RUN}.pt")
    assert sae.config.read_at == "layers.7.attn_heads"
    assert sae.config.metadata["base_model"] == "openai-community/gpt2"
    latents = ((inputs().double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    assert_formula(sae, inputs(), latents, latents @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("said", "changes", "message"),
    [
        (SAID | {"dict_size": F + 1}, {}, "dict_size"),
        (SAID | {"activation_fn": "topk"}, {}, "another library"),
        (SAID, {"b_enc": torch.zeros(F + 1)}, "b_enc .* shape"),
        (SAID, {"W_skip": torch.zeros(1)}, "W_skip, which"),
    ],
)
def test_bad_files(tmp_path: Path, said: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    write(tmp_path, said, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path / f"{RUN}.pt")
