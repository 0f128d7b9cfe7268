"""Small checkpoints of random weights, and the comparison with a formula in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

D, F = 6, 10


def random(seed: int = 0, /, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def inputs(width: int = D) -> Tensor:
    return torch.randn(40, width, generator=torch.Generator().manual_seed(99)) * 2


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def top_k(scores: Tensor, values: Tensor, k: int) -> Tensor:
    """`values` where `scores` is among the k largest of its row, else 0."""
    kept = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, scores.topk(k, dim=-1).indices, True)
    return values.where(kept, torch.zeros_like(values))


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised input, mean and unbiased deviation; eps in the division only."""
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


@torch.no_grad()
def assert_formula(sae: Any, x: Tensor, latents: Tensor, output: Tensor) -> None:
    """What the SAE gives is what the formula gave, up to float32; more than a few latents are active and inactive."""
    found = sae.to(torch.float32)(x.float())
    torch.testing.assert_close(found.latents.double(), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reconstruction.double(), output, rtol=1e-4, atol=1e-4)
    assert 0.02 < float((latents != 0).double().mean()) < 0.98
