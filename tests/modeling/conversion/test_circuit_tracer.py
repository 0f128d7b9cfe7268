"""circuit-tracer's transcoders: read against the formula, written and read back, and what it has no word for."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion.circuit_tracer import write as write_transcoder
from sae_transformers.modeling.conversion.export import export
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random
from tests.modeling.conversion.made import random_sae

HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
CONFIG = {"model_name": "Qwen/Qwen3-4B", "model_kind": "transcoder_set", **HOOKS}
THRESHOLD = "activation_function.threshold"
WRITABLE = {"layer": 2, "site": "mlp_in", "hook_out": "layers.2.mlp_out", "apply_b_dec_to_input": False}


def write(folder: Path, config: dict[str, Any] | None = CONFIG, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer 2 of a set; its tensors in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**random(W_enc=(F, D), W_dec=(F, D), b_enc=(F,), b_dec=(D,)), **more}
    save_file(tensors, folder / "layer_2.safetensors")
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return {name: value.double() for name, value in tensors.items()}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [None, (F,), (), (1,)])
def test_formula(tmp_path: Path, threshold: tuple[int, ...] | None, skip: bool) -> None:
    more = random(5, W_skip=(D, D)) if skip else {}
    if threshold is not None:
        more |= {THRESHOLD: random(6, t=threshold)["t"].abs()}
    t, x = write(tmp_path, CONFIG, **more), inputs().double()
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    pre = x @ t["W_enc"].T + t["b_enc"]
    latents = pre.relu() if threshold is None else pre * (pre > t[THRESHOLD])
    assert_formula(sae, inputs(), latents, latents @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0))
    assert (sae.config.read_at, sae.config.write_at) == ("layers.2.mlp_in", "layers.2.mlp_out")
    assert sae.config.metadata["base_model"] == "Qwen/Qwen3-4B" and sae.config.metadata["format"] == "circuit-tracer"


def test_a_set_without_a_config_is_known_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "qwen3-14b-transcoders", None)
    named = SparseAutoencoder.from_pretrained(tmp_path / "qwen3-14b-transcoders")
    assert named.config.metadata["base_model"] == "Qwen/Qwen3-14B" and named.config.layer == 2
    write(tmp_path / "mine", None)
    with pytest.warns(UserWarning, match="does not say where it reads"):
        other = SparseAutoencoder.from_pretrained(tmp_path / "mine")
    assert not other.config.placed and "base_model" not in other.config.metadata


def test_an_input_before_the_norms_gain_has_no_place(tmp_path: Path) -> None:
    write(tmp_path, CONFIG | {"feature_input_hook": "ln2.hook_normalized"})
    with pytest.warns(UserWarning, match="ln2.hook_normalized, which no Hugging Face module"):
        assert not SparseAutoencoder.from_pretrained(tmp_path).config.placed


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"model_kind": "cross_layer_transcoder"}, {}, "'cross_layer_transcoder'"),
        ({"model_name": 3}, {}, "`model_name` .* must be a text"),
        ({}, {"b_enc": torch.zeros(F + 1)}, "b_enc .* shape"),
        ({}, {THRESHOLD: torch.zeros(F + 1)}, "threshold .* shape"),
        ({}, {"W_skip": torch.zeros(D, D + 1)}, "W_skip .* shape"),
    ],
)
def test_bad_files(tmp_path: Path, config: dict[str, Any], more: dict[str, Any], message: str) -> None:
    write(tmp_path, CONFIG | config, **more)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "a" * 70_000])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, None)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"activation": "jumprelu"},
        {"activation": "batch_topk", "k": 6},
        {"skip_connection": True},
        {"normalization": "scalar", "input_scale": 0.3},
        {"d_out": 9},
    ],
)
def test_what_is_written_is_read_back_equal(tmp_path: Path, kind: dict[str, Any]) -> None:
    sae = random_sae(**WRITABLE, **kind)
    assert export(sae, tmp_path, "circuit-tracer").difference < 1e-6
    stored = load_file(tmp_path / "layer_2.safetensors")
    assert stored["W_enc"].shape == (sae.config.d_sae, sae.config.d_in)
    assert (THRESHOLD in stored) == (sae.config.activation != "relu")
    said = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert said == {"model_kind": "transcoder_set", "model_name": "", **HOOKS}


def test_a_folder_takes_the_other_layers_of_its_set(tmp_path: Path) -> None:
    for layer in (0, 1):
        place = {**WRITABLE, "layer": layer, "hook_out": f"layers.{layer}.mlp_out"}
        assert export(random_sae(**place), tmp_path, "circuit-tracer").difference < 1e-6
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [
        "layer_0.safetensors",
        "layer_1.safetensors",
    ]
    other = random_sae(**WRITABLE, metadata={"base_model": "another/model"})
    with pytest.raises(ValueError, match="`model_name` of the set .* must be ''.*'another/model'"):
        export(other, tmp_path, "circuit-tracer")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"activation": "topk", "k": 4}, "activation='topk'"),
        ({"normalization": "layer_norm"}, "normalization='layer_norm'"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True"),
        ({"layer": None, "site": None, "hook": "model.layers.2.mlp.input"}, "layer=None"),
        ({"hook_out": "layers.3.mlp_out"}, "hook_out='layers.3.mlp_out'"),
        ({"hook_out": None, "site": "resid_post"}, "hook_out=None"),
    ],
)
def test_what_it_cannot_say_is_refused(tmp_path: Path, kind: dict[str, Any], message: str) -> None:
    sae = random_sae(**{**WRITABLE, **kind})
    with pytest.raises(ValueError, match=message):
        write_transcoder(sae.config, sae.state_dict(), tmp_path)
    assert not list(tmp_path.iterdir())
