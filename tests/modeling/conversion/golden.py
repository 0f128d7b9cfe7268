"""Checkpoints of other libraries with the numbers that those libraries computed from them.

They lie in `shared/fixtures/checkpoints` beside the checkout and are not part of the repository: tests that need them
are skipped where they are absent. Each folder holds a checkpoint, `golden.safetensors` (x, features, reconstruction in
float32) and `golden.json` (what the rows mean).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_transformers import SparseAutoencoder

ROOT = Path(__file__).parents[4] / "shared" / "fixtures" / "checkpoints"
TOLERANCE = 1e-5

needs_golden = pytest.mark.skipif(not ROOT.is_dir(), reason="the golden files are not beside this checkout")


def variants(format_name: str) -> list[str]:
    """Names of a format's checkpoints; none where the golden files are absent."""
    folder = ROOT / format_name
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def facts(format_name: str, variant: str) -> dict[str, Any]:
    """What `golden.json` says."""
    return json.loads((ROOT / format_name / variant / "golden.json").read_text(encoding="utf-8"))


def tensors(format_name: str, variant: str) -> dict[str, Tensor]:
    """x (n, d_in), features (n, d_sae), reconstruction (n, d_out), and what else there is."""
    return load_file(ROOT / format_name / variant / "golden.safetensors")


def assert_rows_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to `TOLERANCE` of each row's largest value."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} is not {tuple(expected.shape)}"
    largest = expected.abs().amax(-1).clamp(min=1e-6)
    error = (found - expected).abs().amax(-1) / largest
    assert bool((error <= TOLERANCE).all()), f"{what}: row {int(error.argmax())} is off by {float(error.max()):.2e}"


def check_variant(
    format_name: str,
    variant: str,
    features: str = "features",
    reconstruction: str = "reconstruction",
    x: str = "x",
    **from_pretrained_options: Any,
) -> Any:
    """Read a checkpoint and compare its latents and reconstruction with the original library's.

    Where a row ties (equal scores at the k-th place, a pre-activation equal to its threshold), the tied features are
    not compared: which one is kept is the choice of `torch.topk`, and the reconstruction does not depend on it. Rows
    that the original cannot compute (NaN) must be finite here, and reconstructed as zeros.

    Args:
        features: name of the golden tensor; `reconstruction` and `x` too.
        from_pretrained_options: for `SparseAutoencoder.from_pretrained`.

    Returns:
        The SAE.
    """
    stored, said = tensors(format_name, variant), facts(format_name, variant)
    options = {"dtype": torch.float32, **from_pretrained_options}
    sae = SparseAutoencoder.from_pretrained(ROOT / format_name / variant, **options)
    with torch.no_grad():
        output = sae(stored[x])
    latents, expected = output.latents.clone(), stored[features].clone()
    if tie := said.get("tie"):
        latents[tie["row"], tie["features"]] = expected[tie["row"], tie["features"]] = 0.0
    whole = ~expected.isnan().any(-1)
    assert bool(latents.isfinite().all()) and bool(output.reconstruction.isfinite().all())
    assert_rows_close(latents[whole], expected[whole], "features")
    assert torch.equal(latents[whole] != 0, expected[whole] != 0), "features: other latents are active"
    expected = stored[reconstruction]
    whole = ~expected.isnan().any(-1)
    assert_rows_close(output.reconstruction[whole], expected[whole], "reconstruction")
    assert not output.reconstruction[~whole].any()
    return sae
