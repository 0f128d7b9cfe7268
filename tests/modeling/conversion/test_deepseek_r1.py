"""The SAE of qresearch for DeepSeek-R1-Distill-Llama-8B, against its formula. There is no golden file of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random

FILE = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"


def write(file: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A file in bfloat16, as the published one; its tensors in float64."""
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    tensors = {name: value.bfloat16() for name, value in random(**shapes).items()}
    stored = {**tensors, **changes}
    torch.save({name: value for name, value in stored.items() if value is not None}, file)
    return {name: value.double() for name, value in tensors.items()}


@pytest.mark.parametrize("named", [True, False])
def test_formula(tmp_path: Path, named: bool) -> None:
    t = write(tmp_path / FILE)
    (tmp_path / "README.md").write_text("")
    sae = SparseAutoencoder.from_pretrained(tmp_path / FILE if named else tmp_path)
    assert (sae.config.read_at, sae.dtype) == ("layers.19.resid_post", torch.bfloat16)
    assert sae.config.metadata["base_model"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    latents = (inputs().double() @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    assert_formula(sae, inputs(), latents, latents @ t["decoder.weight"].T + t["decoder.bias"])


def test_another_name_is_not_it(tmp_path: Path) -> None:
    """Two linear maps are the state dict of many SAEs, some of which subtract a bias first."""
    write(tmp_path / "sae.pt")
    with pytest.raises(ValueError, match="of no format that is known"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.bias": torch.zeros(F + 1)}, "encoder.bias .* shape"),
        ({"decoder.weight": torch.zeros(F, D)}, "decoder.weight .* shape"),
        ({"encoder.weight": torch.zeros(F)}, "must be a matrix"),
        ({"bias": torch.zeros(D)}, "bias, which"),
        ({"decoder.bias": "zeros"}, "lacks decoder.bias"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / FILE, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_nothing_is_left_to_state(tmp_path: Path) -> None:
    write(tmp_path / FILE)
    with pytest.raises(TypeError, match="all that is needed.* input_scale"):
        SparseAutoencoder.from_pretrained(tmp_path, input_scale=2.0)
