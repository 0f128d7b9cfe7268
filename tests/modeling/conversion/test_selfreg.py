"""SAEs of SelfReg: against the golden files, and against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, top_k

FILE = "TopK7_l16_h65k_epoch5.pth"
CONFIG = {"d_inp": D, "d_hide": F, "topK": 3}


def weights(**changes: Any) -> dict[str, Any]:
    found = {**random(W_enc=(D, F), b_enc=(F,), b_dec=(D,)), "mask": torch.ones(F), **changes}
    return {name: value for name, value in found.items() if value is not None}


def assert_right(sae: Any) -> None:
    t = {name: value.double() for name, value in weights().items()}
    pre = (inputs().double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    latents = top_k(pre, pre.relu(), 3)
    assert_formula(sae, inputs(), latents, latents @ t["W_enc"].T + t["b_dec"])


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("selfreg"))
def test_golden(variant: str) -> None:
    sae = golden.check_variant("selfreg", variant)
    assert sae.config.read_at == "layers.15.resid_post"  # the file says l16 and counts from 1
    assert "mask" not in sae.config.metadata


@golden.needs_golden
@pytest.mark.parametrize("variant", [name for name in golden.variants("selfreg") if name != "topk_sae"])
def test_golden_classifier_is_no_sae(variant: str) -> None:
    with pytest.raises(ValueError, match="is a SelfReg classifier, with a copy of its SAE"):
        SparseAutoencoder.from_pretrained(golden.ROOT / "selfreg" / variant, sae_id="SelfReg/seed0.pt")


def test_formula(tmp_path: Path) -> None:
    torch.save({"weight": weights(), "config": CONFIG}, tmp_path / FILE)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert (sae.config.read_at, sae.config.tied, sae.config.k) == ("layers.15.resid_post", True, 3)
    assert sae.config.metadata["base_model"] == "mistralai/Mistral-7B-Instruct-v0.2"
    assert "W_enc" not in dict(sae.named_parameters())
    assert_right(sae)


def test_bare_state_dict(tmp_path: Path) -> None:
    folder = tmp_path / "Mistral_TopK_SAE_l8"
    folder.mkdir()
    torch.save(weights(mask=None), folder / "weights.pth")
    with pytest.raises(ValueError, match="Pass `k=`"):
        SparseAutoencoder.from_pretrained(folder)
    sae = SparseAutoencoder.from_pretrained(folder, k=3)
    assert sae.config.read_at == "layers.7.resid_post"
    assert_right(sae)
    torch.save({"weight": weights(), "config": CONFIG}, folder / "weights.pth")
    with pytest.raises(TypeError, match="all that is needed"):
        SparseAutoencoder.from_pretrained(folder, k=3)


def test_mask_is_kept_and_not_used(tmp_path: Path) -> None:
    mask = torch.zeros(F)
    mask[[1, 7]] = 1
    torch.save({"weight": weights(mask=mask), "config": CONFIG}, tmp_path / FILE)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert sae.config.metadata["mask"] == [1, 7]
    assert_right(sae)


def test_classifier_is_no_sae(tmp_path: Path) -> None:
    classifier = {"linear1.weight": torch.zeros(1, D), "linear1.bias": torch.zeros(1)}
    torch.save({"weight": classifier, "config": {"in_dim": D}}, tmp_path / "seed0.pt")
    with pytest.raises(ValueError, match="is a SelfReg classifier, not an SAE"):
        SparseAutoencoder.from_pretrained(tmp_path / "seed0.pt")


def test_repository_of_several(tmp_path: Path) -> None:
    other = "TopK7_l24_h65k_epoch5.pth"
    for name in (FILE, other):
        torch.save({"weight": weights(), "config": CONFIG}, tmp_path / name)
    with pytest.raises(ValueError, match=f"several SAEs: {FILE}, {other}"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, sae_id=other).config.layer == 23


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_inp": D + 1}, "d_inp"), ({"d_hide": "many"}, "d_hide"), ({"topK": 0}, "k=0"),
        ({"topK": None}, "topK=None"), ({"topK": float("nan")}, "topK=nan"), ({"topK": F + 1}, "k=11"),
    ],
)  # fmt: skip
def test_config_that_lies(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    torch.save({"weight": weights(), "config": {**CONFIG, **config}}, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc": torch.zeros(F + 1)}, "b_enc .* shape"),
        ({"mask": torch.zeros(F - 1)}, "mask .* shape"),
        ({"W_enc": torch.zeros(F)}, "must be a matrix"),
        ({"b_dec": "zeros"}, "b_dec"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save({"weight": weights(**changes), "config": CONFIG}, tmp_path / FILE)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)
