"""dictionary_learning checkpoints: the library's own numbers, formulas written out again here, and the way back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import dictionary_learning
from tests.modeling.conversion.golden import check_variant, variants
from tests.modeling.conversion.made import assert_close, check_refused, random_sae, round_trip

D_IN, D_SAE, K, THRESHOLD = 12, 36, 5, 1.1


@pytest.mark.parametrize("variant", variants("dictionary_learning"))
def test_golden(variant, tmp_path):
    sae = check_variant("dictionary_learning", variant)
    again = round_trip(dictionary_learning.FORMAT, sae, tmp_path)
    x = torch.randn(16, sae.config.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encode(x), again.encode(x)) and torch.equal(sae(x).reconstruction, again(x).reconstruction)
    again.config.metadata = sae.config.metadata
    assert again.config == sae.config
    if variant == "AutoEncoder":
        assert sae.config.read_at == "layers.1.resid_post"
        assert sae.config.metadata["base_model"] == "tiny-random/llama"
        assert sae.config.metadata["context_length"] == 64


# -- formulas in float64 ---------------------------------------------------------------------------------------------

LINEAR = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
PLAIN = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": {**LINEAR, "bias": (D_IN,)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": (D_IN,)},
    "GatedAutoEncoder": {
        "encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE), "decoder_bias": (D_IN,),
        "r_mag": (D_SAE,), "gate_bias": (D_SAE,), "mag_bias": (D_SAE,),
    },
    "AutoEncoderTopK": {**LINEAR, "b_dec": (D_IN,)},
    "BatchTopKSAE": {**LINEAR, "b_dec": (D_IN,)},
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (D_SAE,)},
}  # fmt: skip
BIASES = (
    "encoder.bias", "bias", "decoder.bias", "decoder_bias", "gate_bias", "mag_bias", "b_dec", "b_enc", "threshold"
)  # fmt: skip


def made(folder: Path, kind: str, buffer: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Tensor]:
    """Write a dictionary of random weights; gives its tensors."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES[kind].items()}
    if kind == "JumpReluAutoEncoder":
        tensors["threshold"] = tensors["threshold"].abs()
    if "TopK" in kind:
        tensors["k"] = torch.tensor(K, dtype=torch.int)
        tensors["threshold"] = torch.tensor(-1.0 if kind == "AutoEncoderTopK" else THRESHOLD)
    if kind.startswith("Matryoshka"):
        tensors["group_sizes"] = torch.tensor([12, 24])
    said = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "gpt2", "layer": 3}
    said |= {"submodule_name": "resid_post_layer_3", "k": K if "TopK" in kind else ...}
    write(folder, {"trainer": said | trainer, "buffer": {"io": "out", "ctx_len": 64} | (buffer or {})}, tensors)
    return tensors


def write(folder: Path, said: dict[str, Any], stored: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(said.get("trainer"), dict):
        said = {**said, "trainer": {key: value for key, value in said["trainer"].items() if value is not ...}}
    (folder / "config.json").write_text(json.dumps(said))
    torch.save(stored, folder / "ae.pt")


def naive(x: Tensor, tensors: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Latents and output, one token after the other, in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    encoder = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    decoder = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    bias = next(w[name] for name in ("bias", "decoder.bias", "decoder_bias", "b_dec") if name in w)
    subtracts = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    latents, outputs = [], []
    for token in x.double():
        product = (token - bias if subtracts else token) @ encoder
        if kind == "GatedAutoEncoder":
            z = (w["r_mag"].exp() * product + w["mag_bias"]).clamp(min=0) * (product + w["gate_bias"] > 0)
        else:
            pre = product + (w["b_enc"] if "b_enc" in w else w["encoder.bias"])
            z = pre.clamp(min=0)
            if kind == "AutoEncoderTopK":
                others = sorted(range(D_SAE), key=lambda n: -float(z[n]))[K:]  # noqa: B023
                z[others] = 0
            elif "threshold" in w:
                z = torch.where(pre > w["threshold"], z, 0)
        out = z @ decoder + bias
        if kind == "AutoEncoder":  # its loader gives decoder rows norm 1
            z = z * (decoder**2).sum(1).sqrt()
        latents.append(z)
        outputs.append(out)
    return torch.stack(latents), torch.stack(outputs)


@pytest.mark.parametrize("kind", SHAPES)
def test_formula(tmp_path, kind):
    tensors = made(tmp_path, kind)
    x = torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    latents, output = naive(x, tensors, kind)
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, output)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_interrupted_run(tmp_path, kind, as_tensor):
    """Biases and thresholds are in units of x / 7; a run that ended has them times 7."""
    tensors = made(tmp_path, kind)
    said = json.loads((tmp_path / "config.json").read_text())
    factor = torch.tensor(7.0) if as_tensor else 7.0
    write(tmp_path, said, {"step": 3, "ae": tensors, "optimizer": {}, "config": {}, "norm_factor": factor})
    ended = {name: tensor * 7 if name in BIASES else tensor for name, tensor in tensors.items()}
    x = 7 * torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    latents, output = naive(x, ended, kind)
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, output)


def test_interrupted_run_of_raw_activations(tmp_path):
    tensors = made(tmp_path, "JumpReluAutoEncoder")
    said = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, said, {"step": 3, "ae": tensors})
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in tensors.items())
    for factor in (0.0, -2.0, math.nan, "7", True, torch.ones(2)):
        write(tmp_path, said, {"step": 3, "ae": tensors, "norm_factor": factor})
        with pytest.raises(ValueError, match="norm_factor"):
            SparseAutoencoder.from_pretrained(tmp_path)


def test_decoder_of_unit_norm_is_not_touched(tmp_path):
    tensors = made(tmp_path, "AutoEncoder")
    tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    write(tmp_path, json.loads((tmp_path / "config.json").read_text()), tensors)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(sae.W_dec.T, tensors["decoder.weight"]) and torch.equal(sae.W_enc.T, tensors["encoder.weight"])


def test_threshold_that_was_never_set(tmp_path):
    tensors = {**made(tmp_path, "BatchTopKSAE"), "threshold": torch.tensor(-1.0)}
    said = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, said, {"ae": tensors, "norm_factor": 7.0})
    with pytest.warns(UserWarning, match="never set"):
        sae = SparseAutoencoder.from_pretrained(tmp_path)
    assert float(sae.threshold) == -1.0
    assert bool(((sae.encode_pre_acts(torch.randn(9, D_IN)) > 0).sum(-1) > K).any())


# -- configs ---------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "clear": ({}, {}, "layers.3.resid_post"),
    "without its layer": ({"layer": ..., "submodule_name": "mlp_out_layer_3"}, {}, "layers.3.mlp_out"),
    "two layers": ({"layer": 4}, {}, None),
    "no name": ({"submodule_name": None}, {}, None),
    "another name": ({"submodule_name": "resid_3"}, {}, None),
    "a module": ({"submodule_name": "model.layers.3.mlp"}, {}, "model.layers.3.mlp"),
    "an input": ({}, {"io": "in"}, None),
}


@pytest.mark.parametrize("place", PLACES)
def test_places(tmp_path, place):
    trainer, buffer, expected = PLACES[place]
    made(tmp_path, "AutoEncoderNew", buffer, **trainer)
    config = SparseAutoencoder.from_pretrained(tmp_path).config
    assert (config.read_at if config.placed else None) == expected
    assert (config.metadata["base_model"], config.metadata["context_length"]) == ("gpt2", 64)


def test_k_is_in_the_config_in_the_weights_or_given(tmp_path):
    tensors = made(tmp_path, "AutoEncoderTopK", k=...)
    assert SparseAutoencoder.from_pretrained(tmp_path).config.k == K
    del tensors["k"]
    said = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, said, tensors)
    with pytest.raises(ValueError, match="k="):
        SparseAutoencoder.from_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path, k=3).config.k == 3
    made(tmp_path, "AutoEncoderTopK", k=K + 1)
    with pytest.raises(ValueError, match="k=6"):
        SparseAutoencoder.from_pretrained(tmp_path)
    made(tmp_path, "AutoEncoderTopK")
    with pytest.raises(TypeError, match="k"):
        SparseAutoencoder.from_pretrained(tmp_path, k=K)


LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown class": ("AutoEncoder", {"dict_class": "CrossCoder"}, "CrossCoder"),
    "no class": ("AutoEncoder", {"dict_class": None}, "dict_class=None"),
    "class is a list": ("AutoEncoder", {"dict_class": ["AutoEncoder"]}, "dict_class="),
    "another class": ("AutoEncoder", {"dict_class": "GatedAutoEncoder"}, "gate_bias"),
    "another width": ("AutoEncoder", {"activation_dim": 13}, "activation_dim=13"),
    "another size": ("JumpReluAutoEncoder", {"dict_size": 13}, "dict_size=13"),
    "size is a text": ("JumpReluAutoEncoder", {"dict_size": "36"}, "dict_size='36'"),
    "width is NaN": ("AutoEncoder", {"activation_dim": math.nan}, "activation_dim=nan"),
    "k is negative": ("BatchTopKSAE", {"k": -5}, "k=-5"),
    "k is a text": ("BatchTopKSAE", {"k": "5"}, "k='5'"),
    "layer is a text": ("AutoEncoder", {"layer": "3"}, "layer='3'"),
    "submodule is a number": ("AutoEncoder", {"submodule_name": 3}, "submodule_name=3"),
    "model is a list": ("AutoEncoder", {"lm_name": ["gpt2"]}, "lm_name="),
}


@pytest.mark.parametrize("lie", LIES)
def test_configs_that_lie(tmp_path, lie):
    kind, trainer, message = LIES[lie]
    made(tmp_path, kind, **trainer)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("said", [{}, {"trainer": 3}, {"trainer": None}, {"trainer": {}}, {"buffer": []}])
def test_configs_without_their_sections(tmp_path, said):
    tensors = made(tmp_path, "AutoEncoder")
    write(tmp_path, {"trainer": {"dict_class": "AutoEncoder"}, **said} if "buffer" in said else said, tensors)
    with pytest.raises(ValueError, match="trainer|buffer|dict_class"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", SHAPES)
def test_tensors_that_are_missing_unknown_or_of_another_shape(tmp_path, kind):
    tensors = made(tmp_path, kind)
    said = json.loads((tmp_path / "config.json").read_text())
    for name in SHAPES[kind]:
        write(tmp_path, said, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=name):
            SparseAutoencoder.from_pretrained(tmp_path)
        others = (torch.zeros(3, 2, 5), torch.zeros(tensors[name].shape, dtype=torch.int64), torch.zeros(1), [1.0])
        for stored in ({**tensors, name: other} for other in others):
            for whole in (stored, {"ae": stored, "norm_factor": 2.0}):
                write(tmp_path, said, whole)
                with pytest.raises(ValueError):
                    SparseAutoencoder.from_pretrained(tmp_path)
    write(tmp_path, said, {**tensors, "extra": torch.zeros(3)})
    with pytest.raises(ValueError, match="extra"):
        SparseAutoencoder.from_pretrained(tmp_path)
    for name in {"k", "threshold", "group_sizes"} & set(tensors):
        write(tmp_path, said, {**tensors, name: torch.ones(2, 3)})
        if kind != "AutoEncoderTopK" or name != "threshold":  # it is not read there
            with pytest.raises(ValueError, match=name):
                SparseAutoencoder.from_pretrained(tmp_path)


# -- the way back ----------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "AutoEncoder": {"activation": "relu", "layer": 3, "site": "resid_pre"},
    "AutoEncoderNew": {"activation": "relu", "apply_b_dec_to_input": False, "hook": "model.layers.3.mlp"},
    "GatedAutoEncoder": {"activation": "gated", "layer": 3, "site": "attn_heads"},
    "AutoEncoderTopK": {"activation": "topk", "k": 4},
    "BatchTopKSAE": {"activation": "batch_topk", "k": 4, "layer": 0, "site": "mlp_in"},
    "MatryoshkaBatchTopKSAE": {"activation": "batch_topk", "k": 4, "metadata": {"group_sizes": [8, 32]}},
    "JumpReluAutoEncoder": {"activation": "jumprelu", "apply_b_dec_to_input": False, "layer": 3, "site": "mlp_out"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_again_is_the_same(tmp_path, kind, dtype):
    sae = random_sae(dtype=dtype, **KINDS[kind])
    if kind == "AutoEncoder":
        if dtype == torch.bfloat16:
            pytest.skip("rows rounded to bfloat16 have no norm of 1")
        sae.W_dec.data /= sae.W_dec.norm(dim=-1, keepdim=True)
    again = round_trip(dictionary_learning.FORMAT, sae, tmp_path)
    assert again.config.metadata["dict_class"] == kind
    own, found = sae.state_dict(), again.state_dict()
    assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    again.config.metadata = sae.config.metadata
    assert again.config == sae.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ae.pt", "config.json"]


def test_what_is_said_otherwise_computes_the_same(tmp_path):
    x = torch.randn(9, 16)
    for n, settings in enumerate(({"tied": True}, {"normalization": "scalar", "input_scale": 0.4})):
        sae = random_sae(activation="topk", k=4, **settings)
        again = round_trip(dictionary_learning.FORMAT, sae, tmp_path / str(n))
        assert not again.config.tied and again.config.normalization == "none"
        assert_close(again.encode(x), sae.encode(x))
        assert_close(again(x).reconstruction, sae(x).reconstruction)


def test_files_hold_no_more_than_their_tensors(tmp_path):
    """A view of a mapped file would take all of it along."""
    sae = random_sae(activation="topk", k=4, d_in=200, d_sae=400)
    sae.save_pretrained(tmp_path / "ours")
    round_trip(dictionary_learning.FORMAT, SparseAutoencoder.from_pretrained(tmp_path / "ours"), tmp_path / "theirs")
    assert (tmp_path / "theirs" / "ae.pt").stat().st_size < 2 * 200 * 400 * 4 * 1.1


REFUSED: dict[str, dict[str, Any]] = {
    "activation": {"activation": "abs_topk", "k": 3},
    "norms from": {"activation": "relu"},
    "apply_b_dec_to_input=True": {"activation": "jumprelu"},
    "apply_b_dec_to_input=False": {"activation": "topk", "k": 3, "apply_b_dec_to_input": False},
    "k=None": {"activation": "batch_topk"},
    "normalization": {"activation": "gated", "normalization": "layer_norm"},
    "d_out": {"activation": "relu", "d_out": 7, "apply_b_dec_to_input": False},
    "hook_out": {"activation": "relu", "apply_b_dec_to_input": False, "hook": "a.input", "hook_out": "a.output"},
    "skip_connection": {"activation": "relu", "skip_connection": True},
    "glu": {"activation": "relu", "glu": True},
    "scaled_selection": {"activation": "topk", "k": 3, "scaled_selection": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_is_refused(tmp_path, name):
    check_refused(dictionary_learning.FORMAT, random_sae(**REFUSED[name]), tmp_path / "new", name)
