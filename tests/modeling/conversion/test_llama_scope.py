"""Llama Scope, both releases: against the golden files, and against the formulas."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, top_k, write_json

NAME = "Llama3_1-8B-Base-L15R-8x"
HOOK = "blocks.15.hook_resid_post"
CONFIG: dict[str, Any] = {
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.7,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 5.0, "out": 3.0},
    "sparsity_include_decoder_norm": True,
    "top_k": 3,
    "d_model": D,
    "d_sae": F,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
}
R1 = {
    "sae_type": "sae", "act_fn": "jumprelu", "norm_activation": "dataset-wise", "d_model": D,
    "expansion_factor": F / D, "top_k": 50, "hook_point_in": HOOK, "hook_point_out": HOOK,
    "sparsity_include_decoder_norm": True,
}  # fmt: skip
SHAPES = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}


def write(folder: Path, config: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint of the first release; its tensors in float64."""
    tensors = random(**SHAPES)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    stored = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    save_file(stored, folder / "checkpoints" / "final.safetensors")
    write_json(folder / "hyperparams.json", config)
    return {name: value.double() for name, value in tensors.items()}


def formula(t: dict[str, torch.Tensor], config: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norms = config["dataset_average_activation_norm"]
    s_in, s_out = D**0.5 / norms["in"], D**0.5 / norms["out"]
    bias = t["decoder.bias"] / s_out
    x = x.double() - (bias if config.get("apply_decoder_bias_to_pre_encoder") else 0)
    pre = x * s_in @ t["encoder.weight"].T + t["encoder.bias"]
    if config["sparsity_include_decoder_norm"]:
        norm = t["decoder.weight"].norm(dim=0)
        pre, decoder = norm * pre / s_out, t["decoder.weight"] / norm
    else:
        pre, decoder = pre / s_in, t["decoder.weight"] * s_in / s_out
    if config["act_fn"] == "jumprelu":
        latents = pre * (pre > config["jump_relu_threshold"])
    else:
        latents = top_k(pre, pre.relu(), config["top_k"]) if config["act_fn"] == "topk" else pre.relu()
    return latents, latents @ decoder.T + bias


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("llama_scope"))
def test_golden(variant: str) -> None:
    warned: AbstractContextManager = nullcontext()
    if variant == "L0TC-8x":
        warned = pytest.warns(UserWarning, match="blocks.0.ln2.hook_normalized")
    with warned:
        sae = golden.check_variant("llama_scope", variant)
    assert sae.config.metadata["base_model"] == "meta-llama/Llama-3.1-8B"
    assert sae.config.placed is (variant != "L0TC-8x")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity_include_decoder_norm": False},
        {"act_fn": "topk"},
        {"act_fn": "relu", "apply_decoder_bias_to_pre_encoder": True},
    ],
)
def test_formula(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**CONFIG, **changes}
    tensors = write(tmp_path / NAME, config)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert sae.config.read_at == "layers.15.resid_post"
    assert sae.config.metadata["base_model"] == "meta-llama/Llama-3.1-8B"
    assert_formula(sae, x := inputs(), *formula(tensors, config, x))


def test_folds_of_half_precision_stay_in_float32(tmp_path: Path) -> None:
    halves = {name: value.bfloat16() for name, value in random(**SHAPES).items()}
    write(tmp_path, CONFIG, **halves)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert sae.dtype == torch.float32
    tensors = {name: value.double() for name, value in halves.items()}
    assert_formula(sae, x := inputs(), *formula(tensors, CONFIG, x))
    assert SparseAutoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_latent_without_a_decoder_row_never_fires(tmp_path: Path) -> None:
    decoder = random(**SHAPES)["decoder.weight"].clone()
    decoder[:, 2] = 0
    write(tmp_path, CONFIG, **{"decoder.weight": decoder})
    sae = SparseAutoencoder.from_pretrained(tmp_path).requires_grad_(False)
    assert not sae.encode(inputs())[:, 2].any()
    assert not sae.W_dec[2].any()


def test_scales_and_bias_may_be_absent(tmp_path: Path) -> None:
    config = {**CONFIG, "norm_activation": "none", "use_decoder_bias": False}
    tensors = write(tmp_path, config, **{"decoder.bias": None})
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    tensors["decoder.bias"] = torch.zeros(D).double()
    unscaled = {**config, "dataset_average_activation_norm": {"in": D**0.5, "out": D**0.5}}
    assert_formula(sae, x := inputs(), *formula(tensors, unscaled, x))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"), ("act_fn", None), ("jump_relu_threshold", "0.5"), ("jump_relu_threshold", -1.0),
        ("jump_relu_threshold", float("nan")), ("norm_activation", "token-wise"), ("norm_activation", 1),
        ("dataset_average_activation_norm", None), ("dataset_average_activation_norm", {"in": 1.0}),
        ("dataset_average_activation_norm", {"in": 1.0, "out": 0.0}), ("d_model", D + 1), ("d_sae", "ten"),
        ("sparsity_include_decoder_norm", 1), ("use_glu_encoder", True), ("hook_point_in", 7),
    ],
)  # fmt: skip
def test_config_that_lies(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path, {**CONFIG, field: value})
    name = field if field not in ("dataset_average_activation_norm",) else "in|out|dataset_average"
    with pytest.raises(ValueError, match=name):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.bias": None}, "lacks encoder.bias"),
        ({"encoder.bias": torch.zeros(F + 1)}, "encoder.bias .* shape"),
        ({"decoder.weight": torch.zeros(D, F + 1)}, "decoder.weight .* shape"),
        ({"encoder_glu.weight": torch.zeros(F, D)}, "encoder_glu.weight, which"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_repository_of_several(tmp_path: Path) -> None:
    other = "Llama3_1-8B-Base-L16R-8x"
    write(tmp_path / NAME, CONFIG)
    write(tmp_path / other, {**CONFIG, "hook_point_in": "blocks.16.hook_resid_post"})
    with pytest.raises(ValueError, match=f"several SAEs: {NAME}, {other}"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, sae_id=NAME).config.layer == 15


def write_r1(folder: Path, config: dict[str, Any] = R1, **changes: Any) -> dict[str, torch.Tensor]:
    tensors = random(**SHAPES, log_jumprelu_threshold=(F,))
    stored = {**tensors, f"dataset_average_activation_norm.{HOOK}": torch.tensor(5.0), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value for name, value in stored.items() if value is not None}, folder / "sae_weights.safetensors")
    write_json(folder / "config.json", config)
    return {name: value.double() for name, value in tensors.items()}


@pytest.mark.parametrize("include_norm", [True, False])
def test_r1_distill(tmp_path: Path, include_norm: bool) -> None:
    t = write_r1(tmp_path / "400M-Slimpajama/L15R", {**R1, "sparsity_include_decoder_norm": include_norm})
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert sae.config.read_at == "layers.15.resid_post"
    assert sae.config.metadata["base_model"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert sae.config.metadata["format"] == "Llama Scope R1-Distill"
    scale = D**0.5 / 5
    pre = inputs().double() * scale @ t["encoder.weight"].T + t["encoder.bias"]
    gate = pre * t["decoder.weight"].norm(dim=0) if include_norm else pre
    latents = pre.where(gate > t["log_jumprelu_threshold"].exp(), torch.zeros(1).double())
    assert_formula(sae, inputs(), latents, (latents @ t["decoder.weight"].T + t["decoder.bias"]) / scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"dataset_average_activation_norm.{HOOK}": None}, "must hold a positive number dataset_average"),
        ({f"dataset_average_activation_norm.{HOOK}": torch.tensor(float("nan"))}, "positive number"),
        ({"log_jumprelu_threshold": None}, "lacks activation_function.log_jumprelu_threshold"),
    ],
)
def test_r1_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_r1(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)
