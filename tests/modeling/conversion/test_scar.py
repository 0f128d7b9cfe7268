"""SCAR: against the golden files, and against the formula; only the shards with the SAE are opened or fetched."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers import SparseAutoencoder
from tests.loopback_hub import LoopbackHub
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, layer_norm, random, top_k, write_json

CONFIG: dict[str, Any] = {
    "model_type": "llama3_SAE", "activation": "topk", "activation_k": 3, "hook_block_num": 25, "n_inputs": D,
    "n_latents": F, "site": "mlp", "normalize": False, "base_model_name": "meta-llama/Meta-Llama-3-8B",
}  # fmt: skip
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


def tensors(**changes: Any) -> dict[str, torch.Tensor]:
    shapes = {"pre_bias": (D,), "latent_bias": (F,), "encoder.weight": (F, D), "decoder.weight": (D, F)}
    found = {f"SAE.{name}": value for name, value in {**random(**shapes), **changes}.items() if value is not None}
    return {"model.embed_tokens.weight": torch.zeros(20, D), **found}


def write(folder: Path, config: dict[str, Any] = CONFIG, **changes: Any) -> dict[str, torch.Tensor]:
    """A model in one file; the SAE's tensors in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file(stored := tensors(**changes), folder / "model.safetensors")
    return {name[4:]: value.double() for name, value in stored.items() if name.startswith("SAE.")}


def write_shards(folder: Path) -> None:
    """The SAE in the second and third shard; the first is no safetensors file at all."""
    write_json(folder / "config.json", CONFIG)
    stored = tensors()
    second = {name: value for name, value in stored.items() if "coder" in name}
    third = {name: value for name, value in stored.items() if "bias" in name}
    (folder / SHARDS[0]).write_bytes(b"never opened")
    save_file(second, folder / SHARDS[1])
    save_file({**third, "lm_head.weight": torch.zeros(20, D)}, folder / SHARDS[2])
    places = {"model.embed_tokens.weight": SHARDS[0], "lm_head.weight": SHARDS[2]}
    places |= {name: SHARDS[1] for name in second} | {name: SHARDS[2] for name in third}
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def assert_right(sae: Any, t: dict[str, torch.Tensor], kind: str = "topk") -> None:
    x, mean, std = layer_norm(inputs().double())
    pre = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    if kind == "jumprelu":
        latents = pre.relu() * (pre.relu() > t["threshold"].exp())
    else:
        after = {"topk": torch.relu, "topk-sigmoid": torch.sigmoid, "topk-tanh": torch.tanh}[kind]
        latents = top_k(pre, after(pre), 3)
    assert_formula(sae, inputs(), latents, (latents @ t["decoder.weight"].T + t["pre_bias"]) * std + mean)


@golden.needs_golden
@pytest.mark.parametrize("variant", golden.variants("scar"))
def test_golden(variant: str) -> None:
    sae = golden.check_variant("scar", variant)
    assert sae.config.read_at == "layers.1.mlp_out"
    assert sae.config.metadata["base_model"] == "meta-llama/Meta-Llama-3-8B"


@pytest.mark.parametrize("kind", ["topk", "topk-sigmoid", "topk-tanh", "jumprelu"])
def test_formula(tmp_path: Path, kind: str) -> None:
    threshold = random(5, threshold=(F,))["threshold"] if kind == "jumprelu" else None
    t = write(tmp_path, {**CONFIG, "activation": kind}, threshold=threshold)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert (sae.config.read_at, sae.config.normalization) == ("layers.25.mlp_out", "layer_norm")
    assert_right(sae, t, kind)


def test_site_of_a_block(tmp_path: Path) -> None:
    write(tmp_path, {**CONFIG, "site": "block"})
    assert SparseAutoencoder.from_pretrained(tmp_path).config.read_at == "layers.25.resid_post"


def test_only_the_shards_of_the_sae_are_opened(tmp_path: Path) -> None:
    write_shards(tmp_path)
    t = {name[4:]: value.double() for name, value in tensors().items() if name.startswith("SAE.")}
    assert_right(SparseAutoencoder.from_pretrained(tmp_path), t)


@pytest.mark.hub
def test_only_the_shards_of_the_sae_are_fetched(tmp_path: Path) -> None:
    """From a Hub, where a repository of this name says which concept latent 0 was trained for."""
    write_shards(folder := tmp_path / "files")
    script = """
        import json, sys
        from huggingface_hub import HfApi
        from sae_transformers import SparseAutoencoder
        HfApi().create_repo("AIML-TUDA/SCAR")
        HfApi().upload_folder(repo_id="AIML-TUDA/SCAR", folder_path=sys.argv[1])
        for name in ("AIML-TUDA/SCAR", "scar"):
            sae = SparseAutoencoder.from_pretrained(name)
            print(json.dumps([sae.config.concepts, sae.config.read_at]))
    """
    with LoopbackHub() as hub:
        command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
        result = subprocess.run(
            command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        fetched = [request for request in hub.requests if "/resolve/" in request]
    for line in result.stdout.splitlines()[-2:]:
        assert json.loads(line) == [{"toxicity": 0}, "layers.25.mlp_out"]
    assert any(SHARDS[1] in request for request in fetched)
    assert any(SHARDS[2] in request for request in fetched)
    assert not any(SHARDS[0] in request for request in fetched)


def test_concept_of_another_repository_is_not_known(tmp_path: Path) -> None:
    write(tmp_path)
    config = SparseAutoencoder.from_pretrained(tmp_path).config
    assert (config.concepts, config.metadata["conditioned_latent"]) == ({}, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", "gelu"), ("activation", None), ("activation_k", 0), ("activation_k", "many"),
        ("activation_k", float("inf")), ("hook_block_num", -1), ("hook_block_num", "25"), ("hook_block_num", None),
        ("n_inputs", D + 1), ("n_latents", [F]), ("site", "attention"), ("site", 3), ("base_model_name", {}),
    ],
)  # fmt: skip
def test_config_that_lies(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path, {**CONFIG, field: value})
    name = {"activation_k": "`k`|activation_k", "hook_block_num": "layer|hook_block_num"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_bias": None}, "lacks latent_bias"),
        ({"decoder.weight": torch.zeros(F, D)}, "decoder.weight .* shape"),
        ({"threshold": torch.zeros(F)}, "threshold, which"),
        ({"encoder.weight": torch.zeros(F)}, "must be a matrix"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map"),
        ({"weight_map": ["SAE.pre_bias"]}, "weight_map"),
        ({"weight_map": {"SAE.pre_bias": 3}}, "names 3"),
        ({"weight_map": {"SAE.pre_bias": "../elsewhere.safetensors"}}, "expected a file beside it"),
        ({"weight_map": {"SAE.pre_bias": "model-9.safetensors"}}, "lacks model-9.safetensors"),
        ({"weight_map": {"SAE.pre_bias": {"a": 1}}}, "names"),
        ({"weight_map": {"lm_head.weight": SHARDS[2]}}, "lacks encoder.weight"),
    ],
)
def test_bad_index(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    write_shards(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_a_model_without_an_sae_is_not_one(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "llama", "hidden_size": D})
    with pytest.raises(ValueError, match="of no format that is known"):
        SparseAutoencoder.from_pretrained(tmp_path)
