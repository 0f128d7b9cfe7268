"""Qwen Scope: against the golden file, and against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, top_k

REPOSITORY = "SAE-Res-Qwen3.5-27B-W80K-L0_3"


def write(file: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A file; its tensors in float64."""
    tensors = random(W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,))
    tensors["b_enc"] -= 2.0  # fewer than k positive pre-activations in many rows
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value for name, value in {**tensors, **changes}.items() if value is not None}, file)
    return {name: value.double() for name, value in tensors.items()}


def formula(t: dict[str, torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    pre = inputs().double() @ t["W_enc"].T + t["b_enc"]
    latents = top_k(pre, pre, k)
    return latents, latents @ t["W_dec"].T + t["b_dec"]


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("qwen_scope"))
def test_golden(variant: str) -> None:
    assert golden.check_variant("qwen_scope", variant).config.read_at == "layers.0.resid_post"


def test_formula(tmp_path: Path) -> None:
    tensors = write(tmp_path / REPOSITORY / "layer11.sae.pt")
    sae = SparseAutoencoder.from_pretrained(tmp_path / REPOSITORY)
    assert (sae.config.read_at, sae.config.k) == ("layers.11.resid_post", 3)
    assert sae.config.metadata["base_model"] == "Qwen/Qwen3.5-27B"
    latents, output = formula(tensors, 3)
    assert (latents < 0).any()
    assert_formula(sae, inputs(), latents, output)


def test_name_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_4" / "snapshots" / "abc"
    write(folder / "layer0.sae.pt")
    sae = SparseAutoencoder.from_pretrained(folder)
    assert (sae.config.k, sae.config.metadata["base_model"]) == (4, "Qwen/Qwen3-1.7B-Base")


def test_k_is_said_by_the_repository_or_the_caller(tmp_path: Path) -> None:
    tensors = write(tmp_path / "layer2.sae.pt")
    with pytest.raises(ValueError, match="Pass `k=`"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert_formula(SparseAutoencoder.from_pretrained(tmp_path, k=2), inputs(), *formula(tensors, 2))
    for wrong in (0, -1, F + 1, "3", True, 2.5):
        with pytest.raises(ValueError, match="k="):
            SparseAutoencoder.from_pretrained(tmp_path, k=wrong)


def test_repository_of_several(tmp_path: Path) -> None:
    for layer in (0, 1, 2):
        write(tmp_path / REPOSITORY / f"layer{layer}.sae.pt")
    with pytest.raises(ValueError, match="layer0.sae.pt, layer1.sae.pt, layer2.sae.pt. Name one"):
        SparseAutoencoder.from_pretrained(tmp_path / REPOSITORY)
    sae = SparseAutoencoder.from_pretrained(tmp_path / REPOSITORY, sae_id="layer2.sae.pt")
    assert sae.config.layer == 2
    with pytest.raises(OSError, match="layer0.sae.pt"):
        SparseAutoencoder.from_pretrained(tmp_path / REPOSITORY, sae_id="layer9.sae.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": torch.zeros(D, F)}, "shape"),
        ({"W_dec": torch.zeros(F, D)}, "W_dec .* shape"),
        ({"b_enc": [0.0]}, "lacks b_enc"),
        ({"threshold": torch.zeros(F)}, "threshold, which"),
        ({"b_dec": torch.zeros(D, dtype=torch.int32)}, "b_dec .* torch.int32"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / REPOSITORY / "layer0.sae.pt", **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path / REPOSITORY)
