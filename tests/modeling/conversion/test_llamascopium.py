"""Llamascopium: against the golden files, and against the formula."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, top_k, write_json

HOOK, OUT = "blocks.3.hook_resid_pre", "blocks.3.hook_mlp_out"
NORM, THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"
CONFIG: dict[str, Any] = {
    "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True, "act_fn": "jumprelu",
    "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": 3, "hook_point_in": HOOK,
    "hook_point_out": OUT, "use_glu_encoder": False,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint; its tensors in float64."""
    shapes = {"W_E": (D, F), "W_D": (F, D), "b_E": (F,), "b_D": (D,), "W_E_glu": (D, F), "b_E_glu": (F,)}
    tensors = random(**shapes, **{THRESHOLD: (F,)})
    stored = {**tensors, NORM + HOOK: torch.tensor(5.0), NORM + OUT: torch.tensor([2.0])}
    for name, unused in {
        THRESHOLD: config["act_fn"] != "jumprelu",
        "W_E_glu": not config["use_glu_encoder"],
        "b_E_glu": not config["use_glu_encoder"],
        "b_D": not config["use_decoder_bias"],
    }.items():
        if unused:
            del stored[name]
    stored = {name: value for name, value in {**stored, **changes}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "sae_weights.safetensors")
    write_json(folder / "config.json", config)
    return {name: value.double() for name, value in tensors.items()}


def formula(t: dict[str, torch.Tensor], config: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    folded = config["norm_activation"] != "dataset-wise"
    s_in, s_out = (1.0, 1.0) if folded else (D**0.5 / 5, D**0.5 / 2)
    bias = t["b_D"] if config["use_decoder_bias"] else torch.zeros(D).double()
    x = x.double() * s_in
    pre = x @ t["W_E"] + t["b_E"]
    if config["use_glu_encoder"]:
        pre = pre * torch.sigmoid(x @ t["W_E_glu"] + t["b_E_glu"])
    norm = t["W_D"].norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(F).double()
    gate = pre * norm
    kept = {
        "relu": gate.relu(),
        "jumprelu": gate * (gate > t[THRESHOLD].exp()),
        "topk": top_k(gate, gate.relu(), config["top_k"]),
    }
    latents = kept[config["act_fn"]] / norm
    return latents, (latents @ t["W_D"] + bias) / s_out


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("llamascopium"))
def test_golden(variant: str) -> None:
    warned: AbstractContextManager = nullcontext()
    if "transcoder" in variant:
        warned = pytest.warns(UserWarning, match="blocks.1.ln2.hook_normalized")
    with warned:
        sae = golden.check_variant("llamascopium", variant)
    assert sae.config.placed is ("transcoder" not in variant)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity_include_decoder_norm": False},
        {"act_fn": "topk"},
        {"act_fn": "topk", "sparsity_include_decoder_norm": False, "use_decoder_bias": False},
        {"act_fn": "relu", "use_glu_encoder": True},
        {"use_glu_encoder": True, "norm_activation": "inference"},
    ],
)
def test_formula(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**CONFIG, **changes}
    tensors = write(tmp_path, config)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert (sae.config.read_at, sae.config.write_at) == ("layers.3.resid_pre", "layers.3.mlp_out")
    assert_formula(sae, x := inputs(), *formula(tensors, config, x))


def test_a_latent_without_a_decoder_row_never_fires(tmp_path: Path) -> None:
    decoder = random(W_D=(F, D))["W_D"]
    decoder[2] = 0
    write(tmp_path, CONFIG, W_D=decoder)
    sae = SparseAutoencoder.from_pretrained(tmp_path).requires_grad_(False)
    assert not sae.encode(inputs())[:, 2].any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "batchtopk"), ("act_fn", 3), ("sae_type", "crosscoder"), ("norm_activation", "token-wise"),
        ("use_glu_encoder", "no"), ("d_model", D + 1), ("expansion_factor", 8), ("expansion_factor", float("nan")),
        ("sparsity_include_decoder_norm", None), ("hook_point_in", {}), ("hook_point_in", "blocks.9.hook_resid_pre"),
    ],
)  # fmt: skip
def test_config_that_lies(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path, CONFIG)
    write_json(tmp_path / "config.json", {**CONFIG, field: value})
    with pytest.raises(ValueError, match="blocks.9" if value == "blocks.9.hook_resid_pre" else field):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("top_k", [None, "3", 2.5, True, 0, F + 1])
def test_top_k_that_lies(tmp_path: Path, top_k: Any) -> None:
    write(tmp_path, {**CONFIG, "act_fn": "topk", "top_k": top_k})
    with pytest.raises(ValueError, match="k=|`k`"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_E": None}, "lacks b_E"),
        ({THRESHOLD: None}, "lacks activation_function"),
        ({"W_E_glu": torch.zeros(D, F)}, "W_E_glu, which"),
        ({"W_D": torch.zeros(F + 1, D)}, "W_D .* shape"),
        ({"W_E": torch.zeros(2, D, F)}, "W_E .* must be a matrix"),
        ({NORM + HOOK: torch.tensor(-5.0)}, "positive number"),
        ({NORM + OUT: torch.tensor([5.0, 5.0])}, "positive number"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_repository_of_several(tmp_path: Path) -> None:
    for layer in ("L3", "L4"):
        write(tmp_path / layer, CONFIG)
    with pytest.raises(ValueError, match="several SAEs: L3, L4"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, sae_id="L4").config.metadata["original_hook"] == HOOK
