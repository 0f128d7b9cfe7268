"""Gemma Scope: against the golden files, and against the formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.hook_points import find_hook_point
from tests.modeling.conversion import golden
from tests.modeling.conversion.by_hand import D, F, assert_formula, inputs, random
from tests.tiny import prompt, tiny_base

PATH = "layer_12/width_16k/average_l0_20"


def write(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A file, its tensors in float64."""
    tensors = random(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,), threshold=(F,))
    tensors["threshold"].abs_()
    stored = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in stored.items()})  # pyright: ignore
    return {name: value.double() for name, value in tensors.items()}


def formula(t: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pre = x.double() @ t["W_enc"] + t["b_enc"]
    latents = pre.relu() * (pre > t["threshold"])
    return latents, latents @ t["W_dec"] + t["b_dec"]


@golden.needs_golden
@pytest.mark.parametrize("variant", [name for name in golden.variants("gemma_scope") if name != "embedding"])
def test_golden(variant: str) -> None:
    golden.check_variant("gemma_scope", variant)


@golden.needs_golden
def test_golden_embedding() -> None:
    """Where our hook reads, the embedding is multiplied by sqrt(d): so is the reconstruction, `b_dec` included."""
    stored, tie = golden.tensors("gemma_scope", "embedding"), golden.facts("gemma_scope", "embedding")["tie"]
    sae = SparseAutoencoder.from_pretrained(golden.ROOT / "gemma_scope" / "embedding")
    assert (sae.config.read_at, sae.config.apply_b_dec_to_input) == ("layers.0.resid_pre", False)
    rows = torch.arange(len(stored["x"])) != tie["row"]  # the scale rounds, and the tie with the threshold breaks
    with torch.no_grad():
        found = sae(stored["x_stream"][rows])
    root = sae.config.d_in**0.5
    golden.assert_rows_close(found.latents, stored["features"][rows], "features")
    golden.assert_rows_close(found.latents, stored["features_saelens"][rows], "features of SAELens")
    golden.assert_rows_close(found.reconstruction, stored["reconstruction"][rows] * root, "reconstruction")


@pytest.mark.parametrize(
    ("repository", "site", "base"),
    [
        ("gemma-scope-2b-pt-res", "resid_post", "google/gemma-2-2b"),
        ("models--google--gemma-scope-9b-it-res/snapshots/abc", "resid_post", "google/gemma-2-9b-it"),
        ("gemma-scope-27b-pt-mlp", "mlp_out", "google/gemma-2-27b"),
        ("gemma-scope-9b-pt-att", "attn_heads", "google/gemma-2-9b"),
    ],
)
def test_place_and_formula(tmp_path: Path, repository: str, site: str, base: str) -> None:
    tensors = write(tmp_path / repository / PATH)
    sae = SparseAutoencoder.from_pretrained(tmp_path / repository, sae_id=PATH)
    assert (sae.config.layer, sae.config.site, sae.config.metadata["base_model"]) == (12, site, base)
    assert_formula(sae, x := inputs(), *formula(tensors, x))


def test_transcoder_has_no_place(tmp_path: Path) -> None:
    write(folder := tmp_path / "gemma-scope-2b-pt-transcoders" / PATH)
    with pytest.warns(UserWarning, match="norm of layer 12's MLP before the norm's weight"):
        sae = SparseAutoencoder.from_pretrained(folder)
    assert not sae.config.placed
    with pytest.warns(UserWarning, match="no place"):
        sae = SparseAutoencoder.from_pretrained(folder, layer=12, site="mlp_in", hook_out="layers.12.mlp_out")
    assert (sae.config.read_at, sae.config.write_at) == ("layers.12.mlp_in", "layers.12.mlp_out")


def test_embedding_reads_the_scaled_stream(tmp_path: Path) -> None:
    tensors = write(folder := tmp_path / "gemma-scope-2b-pt-res" / "embedding/width_4k/average_l0_6")
    x = inputs()
    latents, output = formula(tensors, x)
    assert_formula(SparseAutoencoder.from_pretrained(folder), x.double() * D**0.5, latents, output * D**0.5)


def test_stream_of_the_model_is_scaled() -> None:
    """What the place of the embedding SAEs relies on: a block reads the embedding times sqrt(d)."""
    base, ids = tiny_base("gemma2"), prompt()
    seen: list[torch.Tensor] = []
    point = find_hook_point(base, base.config, "layers.0.resid_pre")
    point.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        base(input_ids=ids)
    rows = base.get_input_embeddings().weight[ids]  # pyright: ignore
    torch.testing.assert_close(seen[0], rows * base.config.hidden_size**0.5)


def test_unknown_repository_has_no_place(tmp_path: Path) -> None:
    write(tmp_path / PATH)
    assert not SparseAutoencoder.from_pretrained(tmp_path).config.placed
    assert SparseAutoencoder.from_pretrained(tmp_path, layer=3, site="mlp_out").config.read_at == "layers.3.mlp_out"


def test_repository_of_several(tmp_path: Path) -> None:
    other = "layer_3/width_65k/average_l0_9"
    for path in (PATH, other):
        write(tmp_path / "gemma-scope-2b-pt-res" / path)
    root = tmp_path / "gemma-scope-2b-pt-res"
    with pytest.raises(ValueError, match=f"several SAEs: {PATH}, {other}. Name one with `sae_id=`"):
        SparseAutoencoder.from_pretrained(root)
    assert SparseAutoencoder.from_pretrained(root, sae_id=other).config.layer == 3
    assert SparseAutoencoder.from_pretrained(root / other / "params.npz").config.layer == 3
    with pytest.raises(OSError, match=other):
        SparseAutoencoder.from_pretrained(root, sae_id="layer_3/width_65k/average_l0_10")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "lacks threshold"),
        ({"W_skip": torch.zeros(D, D)}, "W_skip, which this format does not know"),
        ({"b_enc": torch.zeros(F + 1)}, r"b_enc .* shape \(10,\)"),
        ({"W_dec": torch.zeros(F)}, "W_dec .* must be a matrix"),
        ({"W_dec": torch.zeros(F - 1, D)}, "W_dec .* shape"),
        ({"b_dec": torch.full((D,), float("nan"))}, "b_dec"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / PATH, **changes)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_nothing_is_left_to_state(tmp_path: Path) -> None:
    write(tmp_path / PATH)
    with pytest.raises(TypeError, match="all that is needed.* k"):
        SparseAutoencoder.from_pretrained(tmp_path, k=4)
