"""One SAE as a folder: what is written is what is read, and damage is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers import SaeForCausalLM, SparseAutoencoder
from tests.tiny import WIDTH, tiny_base, tiny_sae

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 5, "normalization": "layer_norm", "layer": 1, "site": "mlp_out", "concepts": {"anger": 3}},
    "tied": {"k": 5, "tied": True, "metadata": {"licence": "MIT", "steps": 3}, "feature_names": {"7": "a dog"}},
    "batch_topk": {"activation": "batch_topk", "k": 5, "hook": "model.layers.1.mlp.output"},
    "jumprelu": {"activation": "jumprelu", "normalization": "scalar", "input_scale": 0.3, "output_scale": 0.5},
    "gated": {"activation": "gated", "normalization": "constant_norm"},
    "glu": {"activation": "relu", "glu": True},
    "scaled_selection": {"scaled_selection": True, "k": 5},
    "groupmax": {"activation": "groupmax", "k": 4, "normalization": "layer_norm", "normalize_output": False},
    "transcoder": {
        "activation": "relu", "d_out": 20, "hook": "a.input", "hook_out": "a.output", "apply_b_dec_to_input": False,
        "skip_connection": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(tmp_path, kind, dtype):
    sae = tiny_sae(dtype=dtype, **KINDS[kind])
    sae.save_pretrained(tmp_path / "new" / "folder")
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == sae.config and loaded.dtype == dtype
    own, found = sae.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys() and all(torch.equal(own[name], found[name]) for name in own)
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(loaded(x).reconstruction, sae(x).reconstruction)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_the_folder_names_its_format_and_holds_plain_tensors(tmp_path):
    tiny_sae(**KINDS["tied"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["version"], config["d_sae"]) == ("sae_transformers sparse autoencoder", 1, 64)
    assert set(load_file(tmp_path / "model.safetensors")) == {"W_dec", "b_enc", "b_dec", "feature_max"}


def test_a_transposed_encoder_is_stored_in_order(tmp_path):
    """As training keeps it."""
    sae = tiny_sae()
    wanted = sae.W_enc.detach().clone()
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    sae.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["W_enc"], wanted)


def test_another_dtype(tmp_path):
    sae = tiny_sae()
    sae.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in loaded.state_dict().values())
    assert torch.equal(loaded.W_dec, sae.W_dec.bfloat16())


@pytest.mark.parametrize(
    ("place", "read_at", "write_at"),
    [
        ({}, "layers.1.mlp_out", "layers.1.mlp_out"),
        ({"layer": 2, "site": "resid_post"}, "layers.2.resid_post", "layers.2.resid_post"),
        ({"hook": "model.norm"}, "model.norm", "model.norm"),
        ({"hook": "model.norm.input", "hook_out": "model.norm"}, "model.norm.input", "model.norm"),
    ],
)
def test_another_place(tmp_path, place, read_at, write_at):
    tiny_sae(**KINDS["topk"]).save_pretrained(tmp_path)
    config = SparseAutoencoder.from_pretrained(tmp_path, **place).config
    assert (config.read_at, config.write_at) == (read_at, write_at) and config.concepts == {"anger": 3}


def test_saving_over_an_older_one_replaces_it(tmp_path):
    tiny_sae(**KINDS["topk"]).save_pretrained(tmp_path)
    newer = tiny_sae(seed=9, d_sae=48, **KINDS["gated"])
    newer.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.config == newer.config and torch.equal(loaded.W_enc, newer.W_enc)


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def change_tensors(folder: Path, **changes: Any) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "received"),
    [
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: change_config(f, format="other"), "of no format that is known"),
        (lambda f: change_config(f, version=2), "format version 2"),
        (lambda f: change_config(f, d_sae="many"), "d_sae='many'"),
        (lambda f: change_config(f, surprise=1), "surprise"),
        (lambda f: change_config(f, d_sae=32), r"\(32.*64|64.*32"),
        (lambda f: change_config(f, activation="jumprelu"), r"missing \['threshold'\]"),
        (lambda f: change_config(f, tied=True), r"unexpected \['W_enc'\]"),
        (lambda f: change_tensors(f, b_dec=None), r"missing \['b_dec'\]"),
        (lambda f: change_tensors(f, b_dec=torch.zeros(3)), r"b_dec.*\(3,\).*\(32,\)"),
        (lambda f: change_tensors(f, b_dec=torch.full((WIDTH,), torch.nan)), "b_dec"),
        (lambda f: truncate(f / "model.safetensors"), "damaged or cut short"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or cut short"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_damaged_folder_is_refused(tmp_path, spoil, received):
    tiny_sae(activation="topk", k=5).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=received):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_what_is_not_there_and_what_is_unknown(tmp_path):
    with pytest.raises(OSError, match="holds nothing"):
        SparseAutoencoder.from_pretrained(tmp_path)
    tiny_sae().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="layr"):
        SparseAutoencoder.from_pretrained(tmp_path, layr=3)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="holds no model.safetensors"):
        SparseAutoencoder.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written.*file"):
        tiny_sae().save_pretrained(tmp_path / "file")


def test_a_failed_save_leaves_the_older_files_whole(tmp_path, monkeypatch):
    older = tiny_sae()
    older.save_pretrained(tmp_path)

    def full(tensors: Any, path: Any, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("sae_transformers.modeling.sae_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_sae(seed=5).save_pretrained(tmp_path)
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path).W_dec, older.W_dec)


@pytest.mark.parametrize("scope", ["sae", "full"])
def test_an_sae_of_a_model_is_read_alone(tmp_path, scope):
    saes = [tiny_sae(seed=1, layer=0, site="resid_post", **KINDS["jumprelu"]), tiny_sae(seed=2, layer=1, k=7)]
    tiny_base().save_pretrained(tmp_path / "base")
    for name, of in (("two", saes), ("one", saes[1:])):
        model = SaeForCausalLM.from_base(tmp_path / "base", saes=of, weights_scope=scope)
        model.save_pretrained(tmp_path / name)
    for number, sae in enumerate(saes):
        for found in (
            SparseAutoencoder.from_pretrained(tmp_path / "two", sae_id=str(number)),
            SparseAutoencoder.from_pretrained(tmp_path / "two" / str(number)),
        ):
            assert found.config == sae.config
            own, read = sae.state_dict(), found.state_dict()
            assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    alone = SparseAutoencoder.from_pretrained(tmp_path / "one", layer=0, site="mlp_out")
    assert torch.equal(alone.W_enc, saes[1].W_enc) and (alone.config.layer, alone.config.site) == (0, "mlp_out")


def test_which_sae_of_a_model_must_be_said(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    saes = [tiny_sae(seed=n, layer=n, site="resid_post") for n in (0, 1)]
    SaeForCausalLM.from_base(tmp_path / "base", saes=saes).save_pretrained(tmp_path / "two")
    SaeForCausalLM.from_base(tmp_path / "base").save_pretrained(tmp_path / "none")
    for which in ("", "2"):
        with pytest.raises(ValueError, match=f"with 2 SAEs; .* number, 0 to 1. Received: sae_id='{which}'"):
            SparseAutoencoder.from_pretrained(tmp_path / "two", sae_id=which)
    with pytest.raises(ValueError, match="without SAEs"):
        SparseAutoencoder.from_pretrained(tmp_path / "none")
