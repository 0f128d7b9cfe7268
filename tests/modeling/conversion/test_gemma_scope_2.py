"""Gemma Scope 2: against the golden files, and against the formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.hook_points import find_hook_point
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random, write_json
from tests.tiny import tiny_base

OUT = 4
PATH = "transcoder_all/layer_5_width_16k_l0_big_affine"
CONFIG = {
    "architecture": "jump_relu",
    "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    "model_name": "google/gemma-3-4b-it",
    "affine_connection": True,
    "width": F,
}


def write(folder: Path, config: Any = CONFIG, **changes: Any) -> dict[str, torch.Tensor]:
    """A transcoder from 6 to 4 values with a skip connection; its tensors in float64."""
    shapes = {"w_enc": (D, F), "w_dec": (F, OUT), "b_enc": (F,), "b_dec": (OUT,), "threshold": (F,)}
    tensors = random(**shapes, affine_skip_connection=(D, OUT))
    tensors["threshold"].abs_()
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    save_file(stored, folder / "params.safetensors")
    if config is not None:
        write_json(folder / "config.json", config)
    return {name: value.double() for name, value in tensors.items()}


def assert_right(sae: Any, t: dict[str, torch.Tensor]) -> None:
    x = inputs()
    pre = x.double() @ t["w_enc"] + t["b_enc"]
    latents = pre.relu() * (pre > t["threshold"])
    assert_formula(sae, x, latents, latents @ t["w_dec"] + t["b_dec"] + x.double() @ t["affine_skip_connection"])


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("gemma_scope_2"))
def test_golden(variant: str) -> None:
    sae = golden.check_variant("gemma_scope_2", variant)
    assert sae.config.placed
    if variant != "resid_post_all_no_config":
        assert sae.config.metadata["base_model"] == "google/gemma-3-270m"


def test_skip_transcoder(tmp_path: Path) -> None:
    tensors = write(tmp_path / PATH)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert (sae.config.read_at, sae.config.write_at) == (CONFIG["hf_hook_point_in"], CONFIG["hf_hook_point_out"])
    assert sae.config.metadata["base_model"] == "google/gemma-3-4b-it"
    assert_right(sae, tensors)


@pytest.mark.parametrize(
    ("hook", "path", "side"),
    [
        ("model.layers.1.output", "model.layers.1", "output"),
        ("model.layers.1.self_attn.o_proj.input", "model.layers.1.self_attn.o_proj", "input"),
        ("model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.pre_feedforward_layernorm", "output"),
        ("model.layers.1.post_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm", "output"),
    ],
)
def test_hooks_of_the_release_are_modules(hook: str, path: str, side: str) -> None:
    base = tiny_base("gemma3_text")
    point = find_hook_point(base, base.config, hook)
    assert (point.path, point.side) == (path, side)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("transcoder_all/layer_5_width_16k_l0_big_affine", ("layers.5.mlp_in", "layers.5.mlp_out")),
        ("attn_out/layer_11_width_65k_l0_small", ("layers.11.attn_heads", "layers.11.attn_heads")),
        ("mlp_out_all/layer_0_width_16k_l0_small", ("layers.0.mlp_out", "layers.0.mlp_out")),
        ("resid_post_all/layer_17_width_262k_l0_medium", ("layers.17.resid_post", "layers.17.resid_post")),
    ],
)
def test_no_config(tmp_path: Path, path: str, place: tuple[str, str]) -> None:
    square = {"w_dec": torch.ones(F, D), "b_dec": torch.ones(D), "affine_skip_connection": None}
    write(tmp_path / "gemma-scope-2-270m-pt" / path, None, **(square if "transcoder" not in path else {}))
    sae = SparseAutoencoder.from_pretrained(tmp_path / "gemma-scope-2-270m-pt")
    assert (sae.config.read_at, sae.config.write_at) == place
    assert sae.config.metadata["base_model"] == "google/gemma-3-270m"  # the Hub knows no google/gemma-3-270m-pt


def test_damaged_config(tmp_path: Path) -> None:
    tensors = write(tmp_path / "gemma-scope-2-4b-it" / PATH)
    (tmp_path / "gemma-scope-2-4b-it" / PATH / "config.json").write_text("{'width': 1")
    with pytest.warns(UserWarning, match="taken from its path"):
        sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert (sae.config.read_at, sae.config.write_at) == ("layers.5.mlp_in", "layers.5.mlp_out")
    assert sae.config.metadata["base_model"] == "google/gemma-3-4b-it"
    assert_right(sae, tensors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", F + 1), ("width", "10"), ("width", float("nan")), ("architecture", "topk"), ("architecture", 3),
        ("affine_connection", False), ("affine_connection", "yes"), ("hf_hook_point_in", 5), ("model_name", ["a"]),
    ],
)  # fmt: skip
def test_config_that_lies(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path / PATH, {**CONFIG, field: value})
    with pytest.raises(ValueError, match=f"{field}"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_dec": torch.zeros(F, 3, OUT)}, "cross-layer transcoder"),
        ({"w_enc": None}, "lacks w_enc"),
        ({"affine_skip_connection": torch.zeros(OUT, D)}, "affine_skip_connection .* shape"),
        ({"extra": torch.zeros(1)}, "extra, which"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / PATH, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_repository_of_several(tmp_path: Path) -> None:
    other = "transcoder_all/layer_6_width_16k_l0_big_affine"
    write(tmp_path / PATH)
    write(tmp_path / other, None)
    with pytest.raises(ValueError, match=f"several SAEs: {PATH}, {other}"):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, sae_id=other).config.layer == 6
