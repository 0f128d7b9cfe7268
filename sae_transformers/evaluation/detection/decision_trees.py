"""Monosemanticity as SCAR measures it: how small a decision tree on latents separates texts with a concept.

SCAR (https://huggingface.co/papers/2411.07122) fits a Gini tree without a depth limit to the mean latents of whole
texts. Where one latent holds the concept alone the tree is shallow and this latent is at its top. Its code fits the
tree to all rows and looks at those; here other rows tell how accurate it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.optional_packages import needs
from ...latents.sparse_codes import SparseCodes

TOP_LEVELS = 3  # that SCAR draws


class TreeReport(NamedTuple):
    """depth: of the tree, 0 for a single leaf. nodes: splits and leaves. accuracy: on held-out rows; None without.
    root: latent of the first split, None without one. top_splits: splits in the first three levels. top_latents: (.,)
    int64, the latent of each of these. predicted: (n,) int64 labels of held-out rows, None without."""

    depth: int
    nodes: int
    accuracy: float | None
    root: int | None
    top_splits: int
    top_latents: Tensor
    predicted: Tensor | None

    def top_share(self, latent: int) -> float:
        """Share of the splits in the first three levels that look at a latent; 0 where there is no split."""
        return float((self.top_latents == latent).double().mean()) if self.top_splits else 0.0


def concept_tree(
    codes: SparseCodes | Tensor,
    labels: Tensor,
    held_out: SparseCodes | Tensor | None = None,
    held_out_labels: Tensor | None = None,
    *,
    max_depth: int | None = None,
    seed: int = 0,
) -> TreeReport:
    """Fit a decision tree (Gini) to texts and see how large it gets, what it looks at and how right it is elsewhere.

    Args:
        codes: (n, d_sae) of the rows it is fitted to, as `encode_texts` pools them; or dense columns (n, m).
        labels: (n,), 0 or 1; both must occur.
        held_out, held_out_labels: rows that say how accurate it is.
        max_depth: no limit by default, as in SCAR.
        seed: of the order in which equally good splits are tried.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes do not fit, or a class is missing.
    """
    with needs("A decision tree", "scikit-learn", "evaluation"):
        from sklearn.tree import DecisionTreeClassifier
    truth = checked_labels(codes, labels)
    tree = DecisionTreeClassifier(max_depth=max_depth, random_state=seed).fit(latent_matrix(codes), truth.numpy())
    shape = tree.tree_
    level = [[0]]  # numbers of the nodes of each of the first levels
    for _ in range(TOP_LEVELS - 1):
        inner = [node for node in level[-1] if shape.children_left[node] >= 0]
        level.append([int(child[node]) for node in inner for child in (shape.children_left, shape.children_right)])
    top = [int(shape.feature[node]) for nodes in level for node in nodes if shape.children_left[node] >= 0]
    predicted = accuracy = None
    if held_out is not None and held_out_labels is not None:
        predicted = torch.from_numpy(tree.predict(latent_matrix(held_out))).long()
        accuracy = float((predicted == held_out_labels.cpu()).double().mean())
    return TreeReport(
        int(tree.get_depth()), int(shape.node_count), accuracy, top[0] if top else None, len(top),
        torch.tensor(top, dtype=torch.long), predicted,
    )  # fmt: skip


def checked_labels(codes: SparseCodes | Tensor, labels: Tensor) -> Tensor:
    """Labels (n,) int64 on the CPU, one for each row and of both classes.

    Raises:
        ValueError: they are not.
    """
    rows = len(codes) if isinstance(codes, Tensor) else codes.n_rows
    truth = labels.cpu().long()
    members = [int((truth == value).sum()) for value in (0, 1)]
    if len(truth) != rows or sum(members) != len(truth) or not min(members):
        raise ValueError(
            f"Expected a label 0 or 1 for each of {rows} rows, and both. "
            f"Received: {len(truth)} labels, {members[0]} of them 0, {members[1]} of them 1."
        )
    return truth


def latent_matrix(codes: SparseCodes | Tensor) -> Any:
    """For scikit-learn: columns as they are, latents as a compressed matrix of columns, whose order they have."""
    if isinstance(codes, Tensor):
        return codes.detach().cpu().float().numpy()
    from scipy.sparse import csc_matrix

    starts = torch.zeros(codes.d_sae + 1, dtype=torch.long)
    starts[1:] = codes.counts().cumsum(0)
    parts = (codes.values.float().numpy(), codes.rows.numpy(), starts.numpy())
    return csc_matrix(parts, shape=(codes.n_rows, codes.d_sae))
