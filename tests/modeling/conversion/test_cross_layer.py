"""Gemma Scope 2's cross-layer transcoders and crosscoders, and circuit-tracer's, read against the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from sae_transformers import SparseAutoencoder, cross_layer_outputs, load_saes
from tests.modeling.conversion.by_hand import D, F, random

PLACES = 3
SKIP = "affine_skip_connection"
CLT = {
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
    "width": PLACES * F, "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "l0": 150,
    "affine_connection": False, "type": "clt",
}  # fmt: skip
CROSSCODER = {
    **CLT, "hf_hook_point_in": "model.layers.{5,9,12}.output", "hf_hook_point_out": "model.layers.{5,9,12}.output",
    "type": "crosscoder",
}  # fmt: skip


def gemma(folder: Path, config: dict[str, Any] | None, *, skip: bool = False, leak: bool = False) -> list[dict]:
    """The files of all layers; their tensors."""
    folder.mkdir(parents=True)
    layers = []
    for layer in range(PLACES):
        shapes: dict[str, Any] = {"w_enc": (D, F), "w_dec": (F, PLACES, D), "b_enc": (F,), "b_dec": (D,)}
        tensors = random(layer, **shapes, threshold=(F,), **({SKIP: (D, D)} if skip else {}))
        tensors["threshold"] = tensors["threshold"].abs()
        if not leak:
            tensors["w_dec"][:, :layer] = 0
        save_file(tensors, folder / f"params_layer_{layer}.safetensors")
        layers.append(tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return layers


def outputs(layers: list[dict], states: list[Tensor]) -> list[Tensor]:
    """Of every place, by the formula, in float64; the whole of w_dec counts."""
    codes = []
    for t, x in zip(layers, states, strict=True):
        pre = x.double() @ t["w_enc"].double() + t["b_enc"].double()
        codes.append(pre.relu() * (pre > t["threshold"].double()))
    found = []
    for m, (t, x) in enumerate(zip(layers, states, strict=True)):
        y = sum((z @ s["w_dec"][:, m].double() for z, s in zip(codes, layers, strict=True)), t["b_dec"].double())
        found.append(y + x.double() @ t[SKIP].double() if SKIP in t else y)
    return found


def states() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, D, generator=generator) for _ in range(PLACES)]


@pytest.mark.parametrize("skip", [False, True])
def test_a_clt_of_gemma_scope_2(tmp_path: Path, skip: bool) -> None:
    layers = gemma(tmp_path / "clt", {**CLT, "affine_connection": skip}, skip=skip)
    saes = load_saes(str(tmp_path / "clt"))
    assert [sae.config.read_at for sae in saes] == [
        f"model.layers.{n}.pre_feedforward_layernorm.output" for n in range(3)
    ]
    assert saes[1].config.hooks_out == [f"model.layers.{n}.post_feedforward_layernorm.output" for n in (1, 2)]
    assert saes[2].config.hooks_out == ["model.layers.2.post_feedforward_layernorm.output"]
    assert {sae.config.metadata["base_model"] for sae in saes} == {"google/gemma-3-270m"}
    compare(saes, layers)


def compare(saes: list[SparseAutoencoder], layers: list[dict]) -> None:
    """Latents, and outputs of all places."""
    x = states()
    expected = outputs(layers, x)
    for t, sae, state in zip(layers, saes, x, strict=True):
        pre = state.double() @ t["w_enc"].double() + t["b_enc"].double()
        latents = pre.relu() * (pre > t["threshold"].double())
        torch.testing.assert_close(sae.encode(state).double(), latents, rtol=1e-5, atol=1e-5)
    found = list(cross_layer_outputs(saes, x).values())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_crosscoder_of_gemma_scope_2(tmp_path: Path) -> None:
    layers = gemma(tmp_path / "crosscoder", CROSSCODER)
    saes = load_saes(str(tmp_path / "crosscoder"))
    assert [sae.config.read_at for sae in saes] == [f"model.layers.{n}.output" for n in (5, 9, 12)]
    assert saes[0].config.hooks_out == [f"model.layers.{n}.output" for n in (5, 9, 12)]
    assert saes[2].config.write_at == saes[2].config.read_at and not saes[2].config.reconstructs
    compare(saes, layers)


@pytest.mark.parametrize(
    ("path", "read", "written"),
    [
        ("gemma-scope-2-1b-it/clt/width_262k_l0_big", "layers.1.mlp_in", ["layers.1.mlp_out", "layers.2.mlp_out"]),
        (
            "gemma-scope-2-1b-it/crosscoder/layer_7_13_17_width_65k_l0_medium",
            "layers.13.resid_post",
            ["layers.13.resid_post", "layers.17.resid_post"],
        ),
    ],
)
def test_places_by_the_path_where_there_is_no_config(tmp_path: Path, path: str, read: str, written: list[str]) -> None:
    gemma(tmp_path / path, None)
    sae = SparseAutoencoder.from_pretrained(tmp_path / path / "params_layer_1.safetensors")
    assert (sae.config.read_at, sae.config.hooks_out) == (read, written)
    assert sae.config.metadata["base_model"] == "google/gemma-3-1b-it"


def test_places_by_the_path_where_the_config_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2-1b-it" / "clt" / "width_262k_l0_big"
    gemma(folder, None)
    (folder / "config.json").write_text("{")
    with pytest.warns(UserWarning, match="its place is taken from its path"):
        sae = SparseAutoencoder.from_pretrained(folder / "params_layer_1.safetensors")
    assert sae.config.read_at == "layers.1.mlp_in"


def test_rows_to_places_that_have_run_are_told(tmp_path: Path) -> None:
    gemma(tmp_path / "clt", CLT, leak=True)
    with pytest.warns(UserWarning, match="decoder rows to place 0, 1, which the model has passed"):
        SparseAutoencoder.from_pretrained(tmp_path / "clt" / "params_layer_2.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": F}, "`width` .* must be 30"),
        ({"architecture": "relu"}, "must be 'jump_relu'"),
        ({"affine_connection": True}, "`affine_connection` .* must be False"),
        ({"hf_hook_point_in": "model.layers.{1,2}.x"}, "must be those of the 3"),
        ({"hf_hook_point_out": "model.layers.1.x"}, "with their layers in braces"),
        ({"dict_class": "CrossCoder"}, "another library"),
    ],
)
def test_bad_configs_of_gemma_scope_2(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    gemma(tmp_path / "clt", CLT | changed)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path / "clt" / "params_layer_0.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w_dec", (F, D), r"w_dec .* must be \(d_sae, places, d_out\)"),
        ("w_dec", (F, 1, D), "more than 1 places"),
        ("w_dec", (F + 1, PLACES, D), "w_dec .* shape"),
        ("b_dec", (D + 1,), "b_dec .* shape"),
        ("threshold", (F + 1,), "threshold .* shape"),
        ("extra", (2,), "holds extra"),
    ],
)
def test_bad_tensors_of_gemma_scope_2(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    layers = gemma(tmp_path / "clt", CLT)
    save_file({**layers[1], name: torch.ones(shape)}, tmp_path / "clt" / "params_layer_1.safetensors")
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path / "clt" / "params_layer_1.safetensors")


# -- circuit-tracer --------------------------------------------------------------------------------------------------

TRACER = {
    "model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}  # fmt: skip


def tracer(folder: Path, config: dict[str, Any] | None = TRACER, *, threshold: bool = False) -> list[dict]:
    """Files as `CrossLayerTranscoder.to_safetensors` writes them; the tensors by the names of Gemma Scope 2."""
    folder.mkdir(parents=True)
    layers = []
    for n in range(PLACES):
        t = random(n, w_enc=(D, F), w_dec=(F, PLACES, D), b_enc=(F,), b_dec=(D,), threshold=(F,))
        t["threshold"] = t["threshold"].abs() if threshold else torch.zeros(F)
        t["w_dec"][:, :n] = 0
        encoder = {f"W_enc_{n}": t["w_enc"].T.contiguous(), f"b_enc_{n}": t["b_enc"], f"b_dec_{n}": t["b_dec"]}
        save_file(
            encoder | ({f"threshold_{n}": t["threshold"]} if threshold else {}), folder / f"W_enc_{n}.safetensors"
        )
        save_file({f"W_dec_{n}": t["w_dec"][:, n:].contiguous()}, folder / f"W_dec_{n}.safetensors")
        layers.append(t)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return layers


@pytest.mark.parametrize("threshold", [False, True])
def test_a_clt_of_circuit_tracer(tmp_path: Path, threshold: bool) -> None:
    layers = tracer(tmp_path / "clt", threshold=threshold)
    saes = load_saes(str(tmp_path / "clt"))
    assert {sae.config.activation for sae in saes} == {"jumprelu" if threshold else "relu"}
    assert saes[1].config.read_at == "model.layers.1.pre_feedforward_layernorm.input"
    assert saes[1].config.hooks_out == ["layers.1.mlp_out", "layers.2.mlp_out"]
    assert saes[0].config.metadata["base_model"] == "google/gemma-2-2b"
    compare(saes, layers)


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"model_name": "meta-llama/Llama-3.2-1B"}, "model.layers.0.post_attention_layernorm.input"),
        ({"model_name": "google/gemma-2b"}, "model.layers.0.post_attention_layernorm.input"),
        ({"feature_input_hook": "mlp.hook_in"}, "layers.0.mlp_in"),
        ({"model_name": "openai-community/gpt2"}, None),
        (None, None),
    ],
)
def test_places_of_circuit_tracer(tmp_path: Path, config: dict[str, Any] | None, read: str | None) -> None:
    tracer(tmp_path / "clt", None if config is None else TRACER | config)
    path = tmp_path / "clt" / "W_enc_0.safetensors"
    if read is None:
        with pytest.warns(UserWarning, match="reads hook_resid_mid .* has no place"):
            assert not SparseAutoencoder.from_pretrained(path).config.placed
    else:
        assert SparseAutoencoder.from_pretrained(path).config.read_at == read


def test_bad_files_of_circuit_tracer(tmp_path: Path) -> None:
    tracer(tmp_path / "clt", TRACER | {"model_kind": "transcoder_set"})
    with pytest.raises(ValueError, match="must be 'cross_layer_transcoder'"):
        SparseAutoencoder.from_pretrained(tmp_path / "clt" / "W_enc_0.safetensors")
    (tmp_path / "clt" / "W_dec_1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected its decoder beside it, W_dec_1\.safetensors"):
        SparseAutoencoder.from_pretrained(tmp_path / "clt" / "W_enc_1.safetensors")


def test_one_of_several_must_be_named_but_for_layers_of_one_transcoder(tmp_path: Path) -> None:
    gemma(tmp_path / "a" / "clt", CLT)
    with pytest.raises(ValueError, match="holds several SAEs"):
        SparseAutoencoder.from_pretrained(tmp_path / "a" / "clt")
    gemma(tmp_path / "a" / "crosscoder", CROSSCODER)
    with pytest.raises(ValueError, match="holds several SAEs"):
        load_saes(str(tmp_path / "a"))
