"""An SAE pushed by itself comes back as it was, with a card that says how to use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback_hub import LoopbackHub

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.hub
def test_an_sae_is_pushed_and_read_back(tmp_path):
    with LoopbackHub() as hub:
        run = subprocess.run(
            [sys.executable, str(CHECKOUT / "tests" / "scripts" / "push_sae.py")],
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["same"] and seen["concepts"] == {"good": 3}
    assert {"README.md", "config.json", "model.safetensors"} <= set(seen["files"])
    assert 'SparseAutoencoder.from_pretrained("tester/my-sae")' in seen["card"]
    assert "base_model: tester/base" in seen["card"] and "layers.1.resid_post" in seen["card"]
    assert "commit_message" in seen["told"] and "colour" in seen["told"]
