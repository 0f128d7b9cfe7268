"""circuit-tracer loads the set of transcoders that we write, and gives our latents and reconstructions, and of the
cross-layer transcoders that we read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers import cross_layer_outputs, load_saes
from sae_transformers.modeling.conversion.export import export
from tests.modeling.conversion.made import random_sae
from tests.modeling.conversion.test_cross_layer import CLT, gemma, states, tracer

PYTHON = os.environ.get("SAE_TRANSFORMERS_CIRCUIT_TRACER", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PYTHON, reason="SAE_TRANSFORMERS_CIRCUIT_TRACER names no interpreter with circuit-tracer"),
]


def read_by_tracer(folder: Path) -> dict[str, torch.Tensor]:
    script = Path(__file__).with_name("read_with_circuit_tracer.py")
    run = subprocess.run(
        [str(Path(PYTHON).expanduser()), str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"activation": "jumprelu"},
        {"activation": "batch_topk", "k": 6},
        {"skip_connection": True},
        {"activation": "jumprelu", "skip_connection": True, "normalization": "scalar", "input_scale": 0.3},
    ],
    ids=["relu", "jumprelu", "batch topk", "skip", "jumprelu with a skip and a scale"],
)
def test_it_computes_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    saes = [
        random_sae(layer=layer, site="mlp_in", hook_out=f"layers.{layer}.mlp_out", apply_b_dec_to_input=False, **kind)
        for layer in range(3)
    ]
    for sae in saes:
        export(sae, tmp_path / "set", "circuit-tracer")
    x = torch.randn(3, 32, saes[0].config.d_in, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    theirs = read_by_tracer(tmp_path)
    for layer, sae in enumerate(saes):
        ours = sae(x[layer])
        assert torch.equal(ours.latents != 0, theirs["features"][layer] != 0)
        torch.testing.assert_close(ours.latents, theirs["features"][layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.reconstruction, theirs["reconstruction"][layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "gemma with a skip", "relu", "jumprelu"])
def test_a_cross_layer_transcoder_is_read_alike(tmp_path: Path, kind: str) -> None:
    if kind.startswith("gemma"):
        skip = kind != "gemma"
        gemma(tmp_path / "clt", {**CLT, "affine_connection": skip}, skip=skip)
    else:
        tracer(tmp_path / "clt", threshold=kind == "jumprelu")
    saes, x = load_saes(str(tmp_path / "clt")), torch.stack(states())
    save_file({"x": x}, tmp_path / "x.safetensors")
    theirs = read_by_tracer(tmp_path)
    for sae, state, features in zip(saes, x, theirs["features"], strict=True):
        torch.testing.assert_close(sae.encode(state), features, rtol=1e-5, atol=1e-5)
    ours = torch.stack(list(cross_layer_outputs(saes, list(x)).values()))
    torch.testing.assert_close(ours, theirs["reconstruction"], rtol=1e-5, atol=1e-5)
