"""SAEs of OpenAI: against the golden files, and against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, layer_norm, random, top_k

TOP_K: dict[str, Any] = {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}}


def write(file: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A file; its tensors in float64."""
    shapes = {"encoder.weight": (F, D), "decoder.weight": (D, F), "pre_bias": (D,), "latent_bias": (F,)}
    tensors = random(**shapes)
    statistics = {"stats_last_nonzero": torch.zeros(F, dtype=torch.int64), "latents_mean_square": torch.zeros(F)}
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {**tensors, **statistics, **changes}
    torch.save({name: value for name, value in stored.items() if value is not None}, file)
    return {name: value.double() for name, value in tensors.items()}


def assert_right(sae: Any, t: dict[str, torch.Tensor], kind: str) -> None:
    x = inputs()
    if kind.startswith("topk"):
        normalised, mean, std = layer_norm(x.double())
    else:
        normalised, mean, std = x.double(), torch.zeros(1), torch.ones(1)
    pre = (normalised - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    latents = pre.relu() if kind == "relu" else pre
    if kind.startswith("topk"):
        latents = top_k(pre, pre.relu() if kind == "topk" else pre, 3)
    if kind == "identity":
        found = sae(x)
        torch.testing.assert_close(found.latents.double(), latents, rtol=1e-4, atol=1e-5)
        return
    assert_formula(sae, x, latents, (latents @ t["decoder.weight"].T + t["pre_bias"]) * std + mean)


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("openai"))
def test_golden(variant: str) -> None:
    golden.check_variant("openai", variant)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("relu", {"activation": "ReLU", "activation_state_dict": {}}),
        ("relu", {}),
        ("identity", {"activation": "Identity"}),
        ("topk", TOP_K),
        ("topk", {"activation": "TopK", "activation.k": 3, "activation.postact_fn": "ReLU"}),
        ("topk-identity", {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}}),
    ],
)
def test_formula(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    tensors = write(tmp_path / "6.pt", **changes)
    sae = SparseAutoencoder.from_pretrained(tmp_path / "6.pt").requires_grad_(False)
    assert sae.config.activation == kind
    assert_right(sae, tensors, kind)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt", "layers.6.resid_post"),
        ("gpt2-small/resid_delta_mlp/autoencoders/11.pt", "layers.11.mlp_out"),
        ("gpt2-small/resid_delta_attn_v5_128k/autoencoders/0.pt", "layers.0.attn_out"),
        ("gpt2-small/mlp_post_act_v4/autoencoders/3.pt", "layers.3.mlp_act"),
    ],
)
def test_place(tmp_path: Path, path: str, place: str) -> None:
    write(tmp_path / path)
    sae = SparseAutoencoder.from_pretrained(tmp_path, sae_id=path)
    assert (sae.config.read_at, sae.config.metadata["base_model"]) == (place, "openai-community/gpt2")


def test_between_attention_and_mlp_is_no_place(tmp_path: Path) -> None:
    write(tmp_path / "resid_post_attn_v5_32k/autoencoders/6.pt")
    with pytest.warns(UserWarning, match="h.6.ln_2.input"):
        assert not SparseAutoencoder.from_pretrained(tmp_path).config.placed


def test_repository_of_several(tmp_path: Path) -> None:
    for layer in (3, 7):
        write(tmp_path / "resid_post_mlp" / "autoencoders" / f"{layer}.pt")
    with pytest.raises(ValueError, match=r"resid_post_mlp/autoencoders/3.pt, resid_post_mlp/autoencoders/7.pt"):
        SparseAutoencoder.from_pretrained(tmp_path)
    sae = SparseAutoencoder.from_pretrained(tmp_path, sae_id="resid_post_mlp/autoencoders/7.pt")
    assert sae.config.read_at == "layers.7.resid_post"


def test_k_may_be_given(tmp_path: Path) -> None:
    tensors = write(tmp_path / "6.pt", activation="TopK")
    assert_right(SparseAutoencoder.from_pretrained(tmp_path, k=3), tensors, "topk")
    with pytest.raises(ValueError, match="`k`"):
        SparseAutoencoder.from_pretrained(tmp_path)
    write(tmp_path / "6.pt", **TOP_K)
    with pytest.raises(TypeError, match="all that is needed"):
        SparseAutoencoder.from_pretrained(tmp_path, k=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Tanh"}, "activation='Tanh'"),
        ({"activation": 3}, "activation=3"),
        ({**TOP_K, "activation_state_dict": {"k": "3"}}, "k='3'"),
        ({**TOP_K, "activation_state_dict": {"k": 11}}, "k=11"),
        ({**TOP_K, "activation_state_dict": {"k": -1}}, "k=-1"),
        ({**TOP_K, "activation_state_dict": {"k": 3, "postact_fn": "Tanh"}}, "postact_fn='Tanh'"),
        ({**TOP_K, "activation_state_dict": [3]}, "activation_state_dict"),
        ({"decoder.weight": torch.zeros(F, D)}, "decoder.weight"),
        ({"decoder.weight": 5}, "lacks decoder.weight"),
        ({"encoder.scale": torch.zeros(F)}, "encoder.scale, which"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "6.pt", **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)
