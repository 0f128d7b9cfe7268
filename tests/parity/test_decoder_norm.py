"""`fold_decoder_norm` against SAELens' own `fold_W_dec_norm`, on files that both read.

Needs the interpreter of test_peers_read_our_exports.py.
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

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import saelens
from tests.modeling.conversion.made import random_sae

PEERS = os.environ.get("SAE_TRANSFORMERS_PEERS", "")
TOLERANCE = 1e-5  # of the largest value of a row
RUNNER = Path(__file__).with_name("read_with_peer.py")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PEERS, reason="SAE_TRANSFORMERS_PEERS names no interpreter with the other libraries"),
]
CASES: dict[str, dict[str, Any]] = {
    "standard": {"layer": 1, "site": "resid_post"},
    "standard with a scale": {"normalization": "scalar", "input_scale": 0.3},
    "gated": {"activation": "gated"},
    "jumprelu": {"activation": "jumprelu", "layer": 1, "site": "mlp_out"},
    "batch topk": {"activation": "batch_topk", "k": 6},
}


@torch.no_grad()
def test_saelens_folds_to_the_same_numbers(tmp_path: Path) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    jobs, folded, plain = [], {}, {}
    for number, (name, settings) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        sae = random_sae(**settings)
        assert saelens.FORMAT.write is not None
        saelens.FORMAT.write(sae.config, sae.state_dict(), folder)
        folded[name] = SparseAutoencoder.from_pretrained(folder, fold_decoder_norm=True)(x)
        plain[name] = SparseAutoencoder.from_pretrained(folder)(x)
        out = str(tmp_path / f"{number}.safetensors")
        form = {"format": "folded saelens", "folder": str(folder), "x": str(tmp_path / "x.safetensors"), "out": out}
        jobs.append(form)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([PEERS, str(RUNNER), str(tmp_path / "jobs.json")], check=True)
    for job, name in zip(jobs, CASES, strict=True):
        theirs = load_file(job["out"])
        for ours, key in ((folded[name].latents, "features"), (folded[name].reconstruction, "reconstruction")):
            largest = theirs[key].abs().amax(-1, keepdim=True).clamp(min=1e-9)
            assert float(((ours - theirs[key]).abs() / largest).max()) < TOLERANCE, (name, key)
        assert (plain[name].latents - folded[name].latents).abs().max() > 1, name
