"""Steering out and in again: control vectors bit for bit, baked biases by transformers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering, export_steering, load_control_vector
from sae_transformers.workflows.steering.export.export_steering import export_by_name
from sae_transformers.workflows.steering.export.gguf_files import read_control_vector, write_control_vector
from tests.create_training_data.words import word_tokenizer
from tests.tiny import tiny_base, tiny_sae

IDS = torch.arange(3, 12)[None]
STEERING = Steering([FeatureEdit(0, 3, "direction", 2.0), FeatureEdit(1, 5, "direction", -1.5)])


def model_of(family: str, layers: tuple[int, int] = (1, 2), **settings) -> SaeForCausalLM:
    saes = [tiny_sae(seed, layer=layer) for seed, layer in enumerate(layers, start=1)]
    return SaeForCausalLM.from_base(tiny_base(family, **settings), saes=saes)


def test_a_control_vector_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = model_of("llama")
    found = export_steering(model, STEERING, tmp_path / "v.gguf")
    rows = [2 * model.saes[0].W_dec.detach()[3], -1.5 * model.saes[1].W_dec.detach()[5]]
    assert found.to_dict()["norms"] == {1: float(rows[0].norm()), 2: float(rows[1].norm())}
    assert "behind block 1" in found.summary()[0] and "--control-vector" in found.summary()[1]
    loaded = load_control_vector(tmp_path / "v.gguf", model.lm)
    assert loaded.model_hint == "llama" and [sae.config.layer for sae in loaded.model.saes] == [1, 2]
    export_steering(loaded.model, loaded.steering, tmp_path / "again.gguf")
    assert (tmp_path / "v.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    with torch.no_grad():
        wanted = model(IDS, steering=STEERING).logits
        torch.testing.assert_close(loaded.model(IDS, steering=loaded.steering).logits, wanted, rtol=0, atol=1e-5)
    assert (wanted - model(IDS, steering=False).logits).abs().max() > 0.1


def test_it_is_read_beside_saes_by_name_and_with_a_strength(tmp_path: Path) -> None:
    model = model_of("llama")
    model.lm.save_pretrained(tmp_path / "base")
    write_control_vector(tmp_path / "v.gguf", {1: torch.zeros(32), 2: torch.ones(32)}, "llama")
    beside = load_control_vector(tmp_path / "v.gguf", model)
    assert len(beside.model.saes) == 3 and beside.steering == Steering([FeatureEdit(2, 0, "direction", 1.0)])
    half = load_control_vector(tmp_path / "v.gguf", tmp_path / "base", 0.5, dtype=torch.float32)
    export_steering(half.model, half.steering, tmp_path / "half.gguf")
    assert read_control_vector(tmp_path / "half.gguf").directions[2].tolist() == [0.5] * 32


def test_a_control_vector_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_base()
    for vectors, received in (({1: torch.ones(31)}, "direction.1 of 31"), ({3: torch.ones(32)}, "direction.3 of 32")):
        write_control_vector(tmp_path / "v.gguf", vectors, "qwen2")
        with pytest.raises(ValueError, match=rf"directions of 32 .* 1 to 2 .* Received: {received}, .* 'qwen2'"):
            load_control_vector(tmp_path / "v.gguf", base)
    write_control_vector(tmp_path / "v.gguf", {1: torch.zeros(32)}, "llama")
    with pytest.raises(ValueError, match="changes nothing"):
        load_control_vector(tmp_path / "v.gguf", base)
    with pytest.raises(TypeError, match="'dtype'"):
        load_control_vector(tmp_path / "v.gguf", base, dtype=torch.float32)


BAKED = ["llama", "gpt2", "gpt_neox", "opt", "phi", "bloom"]
NOT_BAKED = ["qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen2_moe", "falcon"]


@pytest.mark.parametrize("family", BAKED)
def test_a_baked_bias_gives_the_steered_logits_by_transformers_alone(tmp_path: Path, family: str) -> None:
    model = model_of(family, (0, 2))  # block 0 too
    before = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    found = export_steering(model, STEERING, tmp_path / "baked", "baked_bias", tokenizer=word_tokenizer())
    assert found.difference is not None and found.difference <= 1e-5 and list(found.norms) == [0, 2]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    assert type(plain) is type(model.lm)
    with torch.no_grad():
        wanted, bare = (model(IDS, steering=one).logits for one in (STEERING, False))
        torch.testing.assert_close(plain(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - bare).abs().max() > 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.lm.state_dict().items())
    assert (tmp_path / "baked" / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", NOT_BAKED)
def test_a_family_without_a_bias_is_refused_with_the_reason(tmp_path: Path, family: str) -> None:
    with pytest.raises(ValueError, match="no bias where block 1 .* `mlp_bias`.* Received: to='baked_bias', layer=1"):
        export_steering(model_of(family), STEERING, tmp_path / "baked", "baked_bias")
    assert not (tmp_path / "baked").exists()


@pytest.mark.slow  # an interpreter of its own
def test_the_baked_model_runs_without_this_library(tmp_path: Path) -> None:
    export_steering(model_of("gpt2"), STEERING, tmp_path / "baked", "baked_bias")
    code = (
        "import sys; sys.modules['sae_transformers'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'baked')!r})\n"
        "assert type(model).__name__ == 'GPT2LMHeadModel'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(ValueError, match="new or empty folder"):
        export_steering(model_of("gpt2"), STEERING, tmp_path / "baked", "baked_bias")


def test_half_precision_and_the_models_own_steering(tmp_path: Path) -> None:
    model = model_of("gpt2", dtype=torch.bfloat16)
    model.steering = STEERING
    found = export_steering(model, None, tmp_path / "baked", "baked_bias")
    assert found.difference is not None and found.difference <= 8 * torch.finfo(torch.bfloat16).eps
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "baked").dtype == torch.bfloat16


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`to` must be one of gguf, baked_bias. Received: to='onnx'"):
        export_steering(model_of("llama"), STEERING, tmp_path / "v", "onnx")
    with pytest.raises(ValueError, match="`to` must be one of gguf, baked_bias. Received: to='saelens'"):
        export_by_name("x", [], "{}", tmp_path / "v", "saelens")
    with pytest.raises(TypeError, match="Received: LlamaForCausalLM"):
        export_steering(tiny_base(), STEERING, tmp_path / "v")
    with pytest.raises(ValueError, match="Received: layer=0"):
        export_steering(model_of("llama", (0, 1)), STEERING, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
