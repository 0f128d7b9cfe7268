"""SEA against a full decomposition by numpy, and on states whose directions are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_transformers.training.steering.spectral_editing import spectral_projections


@pytest.mark.parametrize("n", [4, 30])
@pytest.mark.parametrize("share", [0.6, 0.998])
def test_equals_the_whole_decomposition(n: int, share: float) -> None:
    """Fewer texts than dimensions, and more."""
    draw = np.random.RandomState(n)
    neutral, positive, negative = draw.randn(3, n, 9)
    projectors = []
    for states in (positive, negative):
        u, s, _ = np.linalg.svd(neutral.T @ states / n, full_matrices=True)
        k = int(np.argmax(np.cumsum(s**2) / (s**2).sum() >= share)) + 1
        projectors.append((u[:, :k] @ u[:, :k].T, u[:, k:] @ u[:, k:].T))
    hidden = draw.randn(5, 9)
    expected = hidden @ (projectors[0][0] + projectors[1][1]).T
    expected *= np.linalg.norm(hidden, axis=1, keepdims=True) / np.linalg.norm(expected, axis=1, keepdims=True)
    found = spectral_projections(*map(torch.tensor, (neutral, positive, negative)), share=share)
    np.testing.assert_allclose(found.edit(torch.tensor(hidden)).numpy(), expected, atol=1e-10)


def test_known_directions() -> None:
    """The neutral states covary with the positive ones along e1 alone, with the negative ones along e2 alone."""
    neutral = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, -1.0, 0.0]])
    positive, negative = neutral * torch.tensor([1.0, 0, 0]), neutral * torch.tensor([0, 1.0, 0])
    found = spectral_projections(neutral, positive, negative, share=1.0)
    # (x1, 0, 0) is kept and (0, x2, 0) taken out: (x1, x2, x3) -> (2 x1, 0, x3), of the length it had.
    edited = found.edit(torch.tensor([[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]]))
    expected = torch.tensor([[5.0, 0.0, 0.0], [2.0, 0.0, 2.0]])
    expected[1] *= 3 / 8**0.5
    torch.testing.assert_close(edited, expected)
    torch.testing.assert_close(found.edit(torch.zeros(1, 3)), torch.zeros(1, 3))
    assert found.edit(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input() -> None:
    states = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 3\), \(1, 3\)"):
        spectral_projections(states, states, torch.ones(1, 3))
    with pytest.raises(ValueError, match="finite: False"):
        spectral_projections(states, states, states * torch.nan)
    with pytest.raises(ValueError, match="share=0"):
        spectral_projections(states, states, states, share=0)
