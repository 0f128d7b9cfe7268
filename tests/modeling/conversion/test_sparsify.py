"""sparsify checkpoints: the library's own numbers, formulas written out again here, and the way back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import sparsify
from sae_transformers.modeling.hook_points import find_hook_point
from tests.modeling.conversion.golden import ROOT, check_variant, needs_golden, variants
from tests.modeling.conversion.made import assert_close, check_refused, random_sae, round_trip
from tests.tiny import tiny_base

D_IN, D_SAE = 12, 36


@pytest.mark.parametrize("variant", variants("sparsify"))
def test_golden(variant, tmp_path):
    sae = check_variant("sparsify", variant)
    again = round_trip(sparsify.FORMAT, sae, tmp_path)
    x = torch.randn(16, sae.config.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encode(x), again.encode(x)) and torch.equal(sae(x).reconstruction, again(x).reconstruction)
    assert (again.config.read_at, again.config.write_at) == (sae.config.read_at, sae.config.write_at)


@needs_golden
def test_golden_by_its_own_folder():
    for name in (ROOT / "sparsify" / "topk" / "layers.1", ROOT / "sparsify" / "topk"):
        assert SparseAutoencoder.from_pretrained(name).config.read_at == "layers.1.resid_post"
    assert SparseAutoencoder.from_pretrained(ROOT / "sparsify" / "topk_bfloat16").dtype == torch.bfloat16


# -- formulas in float64 ---------------------------------------------------------------------------------------------


def made(folder: Path, skip: bool = False, **config: Any) -> dict[str, Tensor]:
    """Write a sparse coder of random weights; gives its tensors."""
    torch.manual_seed(0)
    tensors = {
        "encoder.weight": torch.randn(D_SAE, D_IN),
        "encoder.bias": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }
    if skip:
        tensors["W_skip"] = torch.randn(D_IN, D_IN)
    said = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": 6}
    said |= {"multi_topk": False, "skip_connection": skip, "transcode": False, "d_in": D_IN}
    write(folder, said | config, tensors)
    return tensors


def write(folder: Path, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    save_file(tensors, folder / "sae.safetensors")


def naive(x: Tensor, tensors: dict[str, Tensor], **config: Any) -> tuple[Tensor, Tensor]:
    """Latents and output, one token after the other, in float64."""
    w, k = {name: tensor.double() for name, tensor in tensors.items()}, 6
    latents, outputs = [], []
    for token in x.double():
        inside = token if config.get("transcode") else token - w["b_dec"]
        pre = w["encoder.weight"] @ inside + w["encoder.bias"]
        if config.get("signed"):
            kept = sorted(range(D_SAE), key=lambda n: -abs(float(pre[n])))[:k]  # noqa: B023
        elif config.get("activation") == "groupmax":
            size = D_SAE // k
            kept = [max(range(g * size, (g + 1) * size), key=lambda n: float(pre[n])) for g in range(k)]  # noqa: B023
        else:
            kept = sorted(range(D_SAE), key=lambda n: -float(pre[n]))[:k]  # noqa: B023
        z = torch.zeros(D_SAE).double()
        for n in kept:
            z[n] = float(pre[n]) if config.get("signed") else max(float(pre[n]), 0.0)
        latents.append(z)
        out = w["b_dec"] + sum(float(z[n]) * w["W_dec"][n] for n in range(D_SAE))
        outputs.append(out + w["W_skip"] @ token if "W_skip" in w else out)
    return torch.stack(latents), torch.stack(outputs)


CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "transcode": {"transcode": True},
    "skip": {"skip": True, "multi_topk": True},
    "transcode with skip": {"skip": True, "transcode": True, "activation": "groupmax"},
    "signed, from before 1.0": {"signed": True, "transcode": ..., "activation": ..., "skip_connection": ...},
    "width by number": {"num_latents": D_SAE, "expansion_factor": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_formula(tmp_path, case):
    tensors = made(tmp_path, **CASES[case])
    x = torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    latents, output = naive(x, tensors, **{key: value for key, value in CASES[case].items() if value is not ...})
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, output)


def test_weights_are_not_touched(tmp_path):
    tensors = made(tmp_path, skip=True)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    own = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, **dict(sae.named_parameters())}
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


# -- places ----------------------------------------------------------------------------------------------------------

PLACES = {
    "layers.3": ("layers.3.resid_post", "layers.3.resid_post"),
    "h.3": ("layers.3.resid_post", "layers.3.resid_post"),
    "layers.3.mlp": ("layers.3.mlp", "layers.3.mlp"),
    "model.layers.3.mlp": ("model.layers.3.mlp", "model.layers.3.mlp"),
    "layers.3.self_attn.o_proj": ("layers.3.self_attn.o_proj", "layers.3.self_attn.o_proj"),
    "embed_tokens": ("embed_tokens", "embed_tokens"),
    "sae-llama-3.1-8b": None,
    "sae_v0.1": None,
    "resid_post": None,
}


@pytest.mark.parametrize("folder", PLACES)
def test_places(tmp_path, folder):
    made(tmp_path / folder)
    config = SparseAutoencoder.from_pretrained(tmp_path / folder).config
    assert ((config.read_at, config.write_at) if config.placed else None) == PLACES[folder]
    made(tmp_path / folder, transcode=True)
    config = SparseAutoencoder.from_pretrained(tmp_path / folder).config
    assert config.placed == (PLACES[folder] is not None)
    if config.placed:
        assert (config.read_at, config.write_at) == (f"{folder}.input", f"{folder}.output")


@pytest.mark.parametrize("head", [True, False])
def test_places_are_found_in_a_model(head):
    base = tiny_base("llama")
    model = base if head else base.model
    blocks = base.model.layers
    for name, transcode, module, side in (
        ("layers.1", False, blocks[1], "output"),
        ("layers.1", True, blocks[1], "input"),
        ("layers.1.mlp", False, blocks[1].mlp, "output"),
        ("layers.1.mlp", True, blocks[1].mlp, "input"),
        ("embed_tokens", False, base.model.embed_tokens, "output"),
    ):
        place = sparsify.place_of_folder(name, transcode)
        found = find_hook_point(model, base.config, place.get("hook") or "layers.1.resid_post")
        assert (found.module, found.side) == (module, side)


# -- what is refused -------------------------------------------------------------------------------------------------

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown activation": ({"activation": "jumprelu"}, "jumprelu"),
    "activation is a number": ({"activation": 3}, "activation=3"),
    "signed groupmax": ({"activation": "groupmax", "signed": True}, "signed"),
    "another d_in": ({"d_in": 13}, "d_in=13"),
    "another width": ({"num_latents": 35}, "num_latents=35"),
    "another expansion": ({"expansion_factor": 4}, "expansion_factor=4"),
    "expansion is a text": ({"expansion_factor": "3"}, "expansion_factor='3'"),
    "width is NaN": ({"num_latents": math.nan}, "num_latents=nan"),
    "k is missing": ({"k": ...}, "k="),
    "k is negative": ({"k": -1}, "k=-1"),
    "k is a fraction": ({"k": 2.5}, "k=2.5"),
    "k is too large": ({"k": 37}, "k=37"),
    "k does not divide": ({"activation": "groupmax", "k": 5}, "k=5"),
    "transcode is a text": ({"transcode": "yes"}, "transcode='yes'"),
    "skip is null": ({"skip_connection": None}, "skip_connection=None"),
    "skip without its matrix": ({"skip_connection": True}, "W_skip"),
}


@pytest.mark.parametrize("lie", LIES)
def test_configs_that_lie(tmp_path, lie):
    config, message = LIES[lie]
    made(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_k_is_given_where_it_is_missing(tmp_path):
    made(tmp_path, k=...)
    assert SparseAutoencoder.from_pretrained(tmp_path, k=4).config.k == 4
    made(tmp_path)
    with pytest.raises(TypeError, match="k"):
        SparseAutoencoder.from_pretrained(tmp_path, k=4)


def test_tensors_that_are_missing_unknown_or_of_another_shape(tmp_path):
    tensors = made(tmp_path, skip=True)
    said = json.loads((tmp_path / "cfg.json").read_text())
    for name, tensor in tensors.items():
        write(tmp_path, said, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=name):
            SparseAutoencoder.from_pretrained(tmp_path)
        for other in (torch.zeros(3, 2, 5), torch.zeros(tensor.shape, dtype=torch.int64), torch.zeros(1)):
            write(tmp_path, said, {**tensors, name: other})
            with pytest.raises(ValueError):
                SparseAutoencoder.from_pretrained(tmp_path)
    write(tmp_path, said, {**tensors, "threshold": torch.zeros(3)})
    with pytest.raises(ValueError, match="threshold"):
        SparseAutoencoder.from_pretrained(tmp_path)


# -- the way back ----------------------------------------------------------------------------------------------------

BETWEEN = {"hook": "layers.2.mlp.input", "hook_out": "layers.2.mlp.output"}
KINDS: dict[str, dict[str, Any]] = {
    "layers.3": {"activation": "topk", "k": 4, "layer": 3},
    "layers.3.mlp": {"activation": "groupmax", "k": 4, "hook": "layers.3.mlp"},
    "layers.2.mlp": {"activation": "topk", "k": 4, "apply_b_dec_to_input": False, "skip_connection": True, **BETWEEN},
    ".": {"activation": "groupmax", "k": 4, "apply_b_dec_to_input": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folder", KINDS)
def test_written_and_read_again_is_the_same(tmp_path, folder, dtype):
    sae = random_sae(dtype=dtype, **KINDS[folder])
    again = round_trip(sparsify.FORMAT, sae, tmp_path / "out")
    assert (tmp_path / "out" / folder / "sae.safetensors").exists()
    own, found = sae.state_dict(), again.state_dict()
    assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    again.config.metadata = {}
    assert again.config == sae.config


def test_a_folder_of_that_name_is_the_folder(tmp_path):
    round_trip(sparsify.FORMAT, random_sae(activation="topk", k=4, layer=3), tmp_path / "layers.3")
    assert sorted(path.name for path in (tmp_path / "layers.3").iterdir()) == ["cfg.json", "sae.safetensors"]
    original = {"original_hook": "h.3"}
    round_trip(sparsify.FORMAT, random_sae(activation="topk", k=4, layer=3, metadata=original), tmp_path / "gpt2")
    assert (tmp_path / "gpt2" / "h.3" / "cfg.json").exists()


def test_what_is_said_otherwise_computes_the_same(tmp_path):
    x = torch.randn(9, 16)
    for n, settings in enumerate(({"tied": True}, {"normalization": "scalar", "input_scale": 0.4})):
        sae = random_sae(activation="topk", k=4, **settings)
        again = round_trip(sparsify.FORMAT, sae, tmp_path / str(n))
        assert not again.config.tied and again.config.normalization == "none"
        assert_close(again.encode(x), sae.encode(x))
        assert_close(again(x).reconstruction, sae(x).reconstruction)


TOPK = {"activation": "topk", "k": 4}
REFUSED: dict[str, dict[str, Any]] = {
    "activation": {"activation": "jumprelu"},
    "normalization": {**TOPK, "normalization": "layer_norm"},
    "d_out": {**TOPK, "d_out": 7, "apply_b_dec_to_input": False},
    "glu": {**TOPK, "glu": True},
    "scaled_selection": {**TOPK, "scaled_selection": True},
    "site": {**TOPK, "layer": 3, "site": "mlp_out"},
    "hook": {**TOPK, "hook": "layers.3.mlp.input"},
    "hook=": {**TOPK, "apply_b_dec_to_input": False, "hook": "layers.3.mlp.input", "hook_out": "layers.4.mlp.output"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_is_refused(tmp_path, name):
    check_refused(sparsify.FORMAT, random_sae(**REFUSED[name]), tmp_path / "new", name)


# -- other libraries' files of these names ---------------------------------------------------------------------------


def latentsae(kind: str, **config: Any) -> dict[str, Any]:
    """What latentsae 0.2.0 writes into `cfg.json` in place of what sparsify does."""
    said: dict[str, Any] = {"sae_type": kind, "expansion_factor": 32, "num_latents": D_SAE, "use_skip": False}
    said |= {"skip_rank": 0, "mean_center": False, "jumprelu_max_active": 512, "sparsity_penalty": 0.001}
    said |= {"k_anneal": False, "k_anneal_pct": 0.3, "lista_eta": 0.1, "lista_steps": 1, "decorr_alpha": 0.0}
    said |= {"max_fire_rate": 0.0, "fire_rate_penalty": 1.0, "batchtopk_threshold": 0.0, "matryoshka_sizes": ""}
    said |= {"cosine_alpha_init": 0.5, "cosine_per_feature": True, "decoder_init_norm": 0.0}
    return {**said, **dict.fromkeys(("activation", "skip_connection", "transcode"), ...), **config}


@pytest.mark.parametrize(("kind", "signed"), [("TOPK", False), ("ABSTOPK", True)])
def test_latentsae(tmp_path, kind, signed):
    tensors = made(tmp_path, **latentsae(kind))
    x = torch.randn(9, D_IN)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    latents, output = naive(x, tensors, signed=signed)
    assert_close(sae.encode(x), latents)
    assert_close(sae(x).reconstruction, output)
    assert sae.config.metadata["format"] == "latentsae"


@pytest.mark.parametrize("kind", ["LISTA", "MATRYOSHKA", "GATED", "JUMPRELU", "BATCHTOPK", "COSINE", "NEW", None, 3])
def test_other_kinds_of_latentsae_are_refused(tmp_path, kind):
    """Their tensors have the names of plain top-k, but not their mathematics."""
    made(tmp_path, **latentsae(kind))
    with pytest.raises(ValueError, match=rf"`sae_type` in .*cfg.json.*Received: sae_type={kind!r}"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (latentsae("TOPK", use_skip=True), "`use_skip` in .* must be false"),
        (latentsae("TOPK", mean_center=True), "`mean_center` in .* must be false"),
        (latentsae("TOPK", activation="groupmax"), "what latentsae never says.* Received: activation"),
        (latentsae("TOPK", rotation="hadamard"), "what latentsae never says.* Received: rotation"),
        ({"architecture": "gated"}, "what sparsify never says.* Received: architecture"),
        ({"lista_steps": 2, "mean_center": False}, "what sparsify never says.* Received: lista_steps, mean_center"),
    ],
)
def test_what_sparsify_never_said_is_refused(tmp_path, config, told):
    made(tmp_path, **config)
    with pytest.raises(ValueError, match=told):
        SparseAutoencoder.from_pretrained(tmp_path)
