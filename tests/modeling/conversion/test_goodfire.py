"""SAEs of Goodfire: against the golden files, and against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random

FILE = "Llama-3.3-70B-Instruct-SAE-l50.pt"
ENCODER, DECODER = "encoder_linear", "decoder_linear"


def write(file: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A file; its tensors in float64."""
    shapes = {f"{ENCODER}.weight": (F, D), f"{ENCODER}.bias": (F,), f"{DECODER}.weight": (D, F)}
    tensors = random(**shapes, **{f"{DECODER}.bias": (D,)})
    stored = {**tensors, **changes}
    torch.save({name: value for name, value in stored.items() if value is not None}, file)
    return {name: value.double() for name, value in tensors.items()}


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("goodfire"))
def test_golden(variant: str) -> None:
    sae = golden.check_variant("goodfire", variant)
    assert sae.config.read_at == "layers.19.resid_post"
    assert sae.config.metadata["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("named", [True, False])
def test_formula(tmp_path: Path, named: bool) -> None:
    t = write(tmp_path / FILE)
    sae = SparseAutoencoder.from_pretrained(tmp_path / FILE if named else tmp_path)
    assert sae.config.read_at == "layers.50.resid_post"
    assert sae.config.metadata["base_model"] == "meta-llama/Llama-3.3-70B-Instruct"
    latents = (inputs().double() @ t[f"{ENCODER}.weight"].T + t[f"{ENCODER}.bias"]).relu()
    assert_formula(sae, inputs(), latents, latents @ t[f"{DECODER}.weight"].T + t[f"{DECODER}.bias"])


def test_another_name_says_no_place(tmp_path: Path) -> None:
    write(tmp_path / "mine.pth")
    (tmp_path / "README.md").write_text("")
    sae = SparseAutoencoder.from_pretrained(tmp_path, sae_id="mine.pth")
    assert not sae.config.placed
    assert "base_model" not in sae.config.metadata


def test_repository_of_several(tmp_path: Path) -> None:
    other = "Llama-3.1-8B-Instruct-SAE-l19.pth"
    write(tmp_path / FILE)
    write(tmp_path / other)
    with pytest.raises(ValueError, match=f"several SAEs: {other}, {FILE}"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, sae_id=other).config.layer == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{ENCODER}.bias": None}, "lacks encoder_linear.bias"),
        ({f"{ENCODER}.bias": 3}, "lacks encoder_linear.bias"),
        ({f"{ENCODER}.weight": 3}, "lacks encoder_linear.weight"),
        ({f"{DECODER}.weight": torch.zeros(F, D)}, "decoder_linear.weight .* shape"),
        ({"threshold": torch.zeros(F)}, "threshold, which"),
        ({f"{DECODER}.bias": torch.full((D,), torch.inf)}, "b_dec"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / FILE, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)
