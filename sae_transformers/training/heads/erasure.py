"""An attribute erased from hidden states without an SAE: directions in which they move when it is swapped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling import SparseAutoencoder, SparseAutoencoderConfig


@dataclass(frozen=True, eq=False)
class Erasure:
    """Takes k directions out of hidden states: x - ((x - centre) @ read) @ write.T.

    read, write: (d, k) float64. centre: (d,) float64, what has nothing to be taken out.
    """

    read: Tensor
    write: Tensor
    centre: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """States (..., d) without the directions, same dtype and device."""
        moved = states.double().cpu() - self.centre
        return states - ((moved @ self.read) @ self.write.T).to(states)

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A linear layer that gives of the states what the given one, weight (n, d) and bias (n,), gives of them
        erased: w - (w @ write) @ read.T, so that the erasure costs nothing where the layer is used."""
        through = weight.double().cpu() @ self.write  # (n, k)
        changed = through @ self.read.T
        return weight - changed.to(weight), bias + (changed @ self.centre).to(bias)


@torch.no_grad()
def swap_directions(original: Tensor, swapped: Tensor, count: int) -> Tensor:
    """Principal directions of the differences of pairs of texts in which only an attribute differs.

    The mean is not taken out first: in pairs that all go one way it is most of the difference, and in pairs that go
    either way it is nothing. "Man is to Computer Programmer as Woman is to Homemaker?"
    (https://huggingface.co/papers/1607.06520), section 5.1, has them from words.

    Args:
        original, swapped: states (n, d), row by row the two texts of a pair.
        count: how many; fewer where the differences have fewer.

    Returns:
        (d, k) float64 on the CPU, orthonormal, the one with the most of the differences first.

    Raises:
        ValueError: shapes differ, or no pair differs.
    """
    if original.shape != swapped.shape or original.ndim != 2 or count < 1:
        raise ValueError(
            f"Expected states (n, d) of both texts of n pairs, and a count of 1 or more. "
            f"Received: {tuple(original.shape)} and {tuple(swapped.shape)}, count={count!r}."
        )
    _, sizes, directions = torch.linalg.svd((original.double() - swapped.double()).cpu(), full_matrices=False)
    rank = int((sizes > sizes.max() * 1e-10).sum()) if len(sizes) and float(sizes.max()) > 0 else 0
    if not rank:
        raise ValueError("Some pair of states must differ. Received: none that does.")
    return directions[: min(count, rank)].T.contiguous()


def project_out(states: Tensor, directions: Tensor) -> Erasure:
    """The orthogonal projection that takes orthonormal directions (d, k) out; states (n, d) keep their mean."""
    return Erasure(directions, directions, states.double().cpu().mean(0))


@torch.no_grad()
def leace(states: Tensor, directions: Tensor) -> Erasure:
    """The affine map that takes directions out and changes states the least.

        r(x) = x - W^-1 Q Q^T W (x - mean),  W = covariance^-1/2,  Q an orthonormal basis of W @ directions

    "LEACE: Perfect linear concept erasure in closed form" (https://huggingface.co/papers/2306.03819), theorem 4.3,
    for a concept whose covariance with the states has these directions as its columns: no linear classifier of the
    erased states can tell it. Among all maps that do so r moves the states least, in the norm of their covariance as
    in any other. The covariance is shrunk towards a multiple of the identity (oracle approximating shrinkage, Chen et
    al. 2010, https://doi.org/10.1109/TSP.2010.2053029), so that fewer states than coordinates will do.

    Args:
        states: (n, d), n at least 2: what is to be changed little.
        directions: (d, k).
    """
    if states.ndim != 2 or len(states) < 2 or directions.ndim != 2 or directions.shape[0] != states.shape[1]:
        raise ValueError(
            f"Expected states (n, d), n at least 2, and directions (d, k). "
            f"Received: {tuple(states.shape)} and {tuple(directions.shape)}."
        )
    rows = states.double().cpu()
    centre = rows.mean(0)
    values, vectors = torch.linalg.eigh(_shrunk_covariance(rows - centre))
    roots = values.clamp(min=values.max() * 1e-12).sqrt()
    whitened = vectors @ ((vectors.T @ directions.double().cpu()) / roots[:, None])  # W @ directions
    basis, _ = torch.linalg.qr(whitened)
    inside = vectors.T @ basis
    return Erasure(vectors @ (inside / roots[:, None]), vectors @ (inside * roots[:, None]), centre)


def difference_sae(differences: Tensor) -> SparseAutoencoder:
    """An SAE whose features are differences of swapped texts, (m, d): what feature j adds to a logit, `w @ W_dec[j]`,
    is how far the logits of pair j are apart. SelfReg's penalty on all of them, with `alignment="decoder"` and nothing
    removed, is counterfactual logit pairing, mean_j |logit - logit'|
    (https://huggingface.co/papers/1809.10610, section 4.4)."""
    count, width = differences.shape
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=width, d_sae=count, activation="relu"))
    with torch.no_grad():
        sae.W_dec.copy_(differences)
    return sae


def _shrunk_covariance(rows: Tensor) -> Tensor:
    """(d, d), of centred rows (n, d)."""
    n, d = rows.shape
    found = rows.T @ rows / n
    size, squares = found.diagonal().mean(), found.square().mean()
    share = float((squares + size.square()) / ((n + 1) * (squares - size.square() / d)).clamp(min=1e-300))
    share = min(share, 1.0)
    return (1 - share) * found + share * size * torch.eye(d, dtype=found.dtype)
