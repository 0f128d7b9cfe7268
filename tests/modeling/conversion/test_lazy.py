"""Large checkpoints are mapped: opening one takes little memory, steering with a latent reads its rows alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to measure memory")

D, F = 32, 2**20
SCRIPT = """
import sys
from pathlib import Path
import torch
from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.modeling import conversion
from tests.tiny import prompt, tiny_base

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

base = tiny_base()
base.generate(prompt(), max_new_tokens=2)  # what torch allocates once
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS:")
sae = SparseAutoencoder.from_pretrained(sys.argv[1], layer=1, site="resid_post", check_values=sys.argv[2] == "check")
print(resident("VmHWM:") - before)
if sys.argv[2] != "check":
    model = SaeForCausalLM.from_base(base, saes=[sae])
    edits = [FeatureEdit(feature=f, op="add", value=1.0) for f in range(0, 10_000, 1000)]
    model.generate(prompt(), steering=Steering(edits), max_new_tokens=2)
    print(resident("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, int]:
    """A SAELens file of 268 MB of zeros, which a disk stores as a hole."""
    folder, offset = tmp_path_factory.mktemp("large"), 0
    header: dict[str, object] = {}
    for name, shape in {"W_enc": [D, F], "W_dec": [F, D], "b_enc": [F], "b_dec": [D]}.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps({**config, "apply_b_dec_to_input": False, "metadata": {}}))
    return folder, offset


def peaks(folder: Path, how: str) -> list[int]:
    """Memory at most after opening and, where nothing was checked, after steering, in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), how],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.slow
def test_opening_takes_no_more_than_the_file(checkpoint):
    folder, size = checkpoint
    assert peaks(folder, "check")[0] < 1.1 * size


@pytest.mark.slow
def test_opened_without_the_check_nothing_is_read_but_what_is_used(checkpoint):
    folder, size = checkpoint
    opened, steered = peaks(folder, "lazy")
    assert opened < 0.1 * size
    assert steered < 0.3 * size
