"""What we write, the libraries read: their loaders and mathematics give our latents and reconstructions.

Needs an interpreter with sae-lens, eai-sparsify and dictionary-learning, named by SAE_TRANSFORMERS_PEERS:

    SAE_TRANSFORMERS_PEERS=~/peers/bin/python pytest -m parity tests/parity
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers.modeling.conversion import dictionary_learning, saelens, sparsify
from tests.modeling.conversion.made import random_sae

PEERS = os.environ.get("SAE_TRANSFORMERS_PEERS", "")
TOLERANCE = 1e-5
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PEERS, reason="SAE_TRANSFORMERS_PEERS names no interpreter with the other libraries"),
]

FORMATS = {form.name: form for form in (saelens.FORMAT, sparsify.FORMAT, dictionary_learning.FORMAT)}
TOPK = {"activation": "topk", "k": 6}
TRANSCODER = {"apply_b_dec_to_input": False, "hook": "layers.2.mlp.input", "hook_out": "layers.2.mlp.output"}
NO_BIAS = {"apply_b_dec_to_input": False}
SKIP = {**TRANSCODER, "skip_connection": True}
HALF = {"normalization": "layer_norm", "normalize_output": False}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "saelens": {
        "standard": {"layer": 1, "site": "resid_post"},
        "standard without the bias": NO_BIAS,
        "standard of heads": {"layer": 1, "site": "attn_heads"},
        "standard with a scale": {"normalization": "scalar", "input_scale": 0.3},
        "gated": {"activation": "gated"},
        "gated with a layer norm": {"activation": "gated", "normalization": "layer_norm", **NO_BIAS},
        "topk": TOPK,
        "topk of tied weights": {**TOPK, "tied": True},
        "topk of a constant norm": {**TOPK, "normalization": "constant_norm"},
        "abstopk": {**TOPK, "activation": "abs_topk"},
        "jumprelu": {"activation": "jumprelu", "layer": 1, "site": "mlp_out"},
        "jumprelu with a layer norm": {"activation": "jumprelu", "normalization": "layer_norm", **NO_BIAS},
        "batch topk": {"activation": "batch_topk", "k": 6},
        "transcoder": {**TRANSCODER, "d_out": 9, **HALF},
        "transcoder of a constant norm": {**TRANSCODER, **HALF, "normalization": "constant_norm"},
        "skip_transcoder": {**SKIP, "d_out": 9},
        "jumprelu_transcoder": {**TRANSCODER, "activation": "jumprelu", "d_out": 9},
        "jumprelu_skip_transcoder": {**SKIP, "activation": "jumprelu", **HALF},
        "transcoder with two scales": {
            **TRANSCODER, "d_out": 9, "normalization": "scalar", "input_scale": 0.3, "output_scale": 2.0
        },
        "batch topk transcoder": {**TRANSCODER, "activation": "batch_topk", "d_out": 9},
    },
    "sparsify": {
        "topk": {**TOPK, "layer": 1},
        "topk with a skip": {**TOPK, "skip_connection": True},
        "topk of tied weights": {**TOPK, "tied": True},
        "topk with a scale": {**TOPK, "normalization": "scalar", "input_scale": 0.3},
        "groupmax": {"activation": "groupmax", "k": 8, "hook": "layers.1.mlp"},
        "transcoder": {**TOPK, **TRANSCODER},
        "groupmax transcoder with a skip": {**SKIP, "activation": "groupmax", "k": 8},
    },
    "dictionary_learning": {
        "AutoEncoder": {"unit_norm": True, "layer": 1},
        "AutoEncoderNew": NO_BIAS,
        "GatedAutoEncoder": {"activation": "gated"},
        "AutoEncoderTopK": TOPK,
        "AutoEncoderTopK with a scale": {**TOPK, "normalization": "scalar", "input_scale": 0.3},
        "BatchTopKSAE": {"activation": "batch_topk", "k": 6},
        "MatryoshkaBatchTopKSAE": {"activation": "batch_topk", "k": 6, "metadata": {"group_sizes": [10, 30]}},
        "JumpReluAutoEncoder": {"activation": "jumprelu", **NO_BIAS},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, str], tuple[Any, dict[str, torch.Tensor], torch.Tensor]]:
    """Every case written by us and run by its library, in one process: importing the libraries takes long."""
    root, jobs, saes = tmp_path_factory.mktemp("exports"), [], {}
    for form, cases in CASES.items():
        for n, (case, settings) in enumerate(cases.items()):
            settings = dict(settings)
            unit_norm = settings.pop("unit_norm", False)
            sae, folder = random_sae(**settings), root / form / str(n)
            if unit_norm:
                sae.W_dec.data /= sae.W_dec.norm(dim=-1, keepdim=True)
            write = FORMATS[form].write
            assert write is not None
            write(sae.config, sae.state_dict(), folder)
            inside = next(path.parent for path in folder.rglob("*.json"))
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(n))
            save_file({"x": x}, root / f"{form}-{n}-x.safetensors")
            out = root / f"{form}-{n}-out.safetensors"
            jobs.append({"format": form, "folder": str(inside), "x": str(root / f"{form}-{n}-x.safetensors")})
            jobs[-1]["out"] = str(out)
            saes[form, case] = (sae, out, x)
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("read_with_peer.py")
    done = subprocess.run(
        [str(Path(PEERS).expanduser()), str(script), str(root / "jobs.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {key: (sae, load_file(out), x) for key, (sae, out, x) in saes.items()}


@pytest.mark.parametrize(("form", "case"), [(form, case) for form, cases in CASES.items() for case in cases])
def test_the_library_computes_the_same(results, form, case):
    sae, theirs, x = results[form, case]
    ours = sae(x)
    for name, found in (("features", ours.latents), ("reconstruction", ours.reconstruction)):
        assert found.shape == theirs[name].shape
        largest = found.abs().amax(-1).clamp(min=1e-6)
        error = float(((found - theirs[name]).abs().amax(-1) / largest).max())
        assert error <= TOLERANCE, f"{name} is off by {error:.2e}"
    assert torch.equal(ours.latents != 0, theirs["features"] != 0)
