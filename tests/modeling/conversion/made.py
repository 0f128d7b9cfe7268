"""SAEs of random weights, and the way through a foreign format and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import SparseAutoencoder, SparseAutoencoderConfig
from sae_transformers.modeling.conversion import Format


def random_sae(seed: int = 1, dtype: Any = torch.float32, **settings: Any) -> Any:
    """16 values, 40 latents; biases, thresholds and decoder norms that matter."""
    sae: Any = SparseAutoencoder(
        SparseAutoencoderConfig(**{"d_in": 16, "d_sae": 40, "activation": "relu", **settings})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name != "feature_max":
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if name in ("threshold", "selection_scale"):
                tensor.abs_()
    return sae.to(dtype).requires_grad_(False)


def round_trip(form: Format, sae: Any, folder: Path) -> Any:
    """Written in a format and read again."""
    assert form.write is not None
    form.write(sae.config, sae.state_dict(), folder)
    return SparseAutoencoder.from_pretrained(folder).requires_grad_(False)


def check_refused(form: Format, sae: Any, folder: Path, name: str) -> None:
    """A writer says what its format cannot say, and writes nothing."""
    assert form.write is not None
    with pytest.raises(ValueError, match=name):
        form.write(sae.config, sae.state_dict(), folder)
    assert not folder.exists()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest value."""
    assert found.shape == expected.shape
    assert float((found.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max())
