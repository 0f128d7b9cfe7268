"""The Feature Monosemanticity Score (FMS) of G-SAE: does one latent hold a concept, and does it alone?

    local@p = 2 (acc_0 - acc_p)          what is lost with the p best latents: to chance, where one held the concept
    global  = 1 - mean_i (acc_{0..i} - acc_0)     what further latents add: nothing, where one held it all
    FMS@p   = acc_0 (local@p + global) / 2        a score over several concepts is the mean of theirs

acc_0 is the accuracy of the first split of SCAR's decision tree (`decision_trees`), acc_p that of the first split
after the latents of the p first splits so far were taken away, one after the other, and acc_{0..i} that of the tree
cut after i more levels, for every level that it has. The accuracies are of the texts that the trees were fitted to.

"Measuring and Guiding Monosemanticity" (https://arxiv.org/abs/2506.19382), with the details of its code,
https://github.com/ml-research/measuring-and-guiding-monosemanticity, eval/FMS_Scores.ipynb and utils/tree_loader.py.
The code, other than the formula, counts the tree without any split among the levels: `legacy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...latents.optional_packages import needs
from ...latents.sparse_codes import SparseCodes
from .decision_trees import checked_labels, latent_matrix

REMOVED = (1, 5)  # of the paper


class Monosemanticity(NamedTuple):
    """capacity: acc_0. isolation: `global`, 1 for a tree of one level. local: p -> local@p. score: p -> FMS@p.

    roots: the latents of the first splits, the best first; fewer where no latent splits any more. levels: accuracy of
    the tree cut after 0, 1, 2, ... levels, the first that of the larger class.
    """

    capacity: float
    isolation: float
    local: Mapping[int, float]
    score: Mapping[int, float]
    roots: Sequence[int]
    levels: Sequence[float]


def monosemanticity(
    codes: SparseCodes | Tensor,
    labels: Tensor,
    removed: Sequence[int] = REMOVED,
    *,
    legacy: bool = False,
    seed: int = 0,
) -> Monosemanticity:
    """FMS of one concept.

    Args:
        codes: (n, d_sae) mean latents of texts, as `encode_texts` pools them; or dense columns (n, m).
        labels: (n,), 0 or 1; both must occur.
        removed: each p.
        legacy: as the authors' code averages `global`.
        seed: of the order in which equally good splits are tried.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes do not fit, a class or a split is missing, or a p below 1.
    """
    with needs("A decision tree", "scikit-learn", "evaluation"):
        from sklearn.tree import DecisionTreeClassifier
    truth = checked_labels(codes, labels)
    if not removed or min(removed) < 1:
        raise ValueError(f"`removed` must be numbers of 1 or more. Received: removed={list(removed)!r}.")
    matrix = latent_matrix(codes)
    tree = DecisionTreeClassifier(random_state=seed).fit(matrix, truth.numpy())
    levels = _by_level(tree, matrix, truth)
    if len(levels) < 2:
        raise ValueError("Expected latents that tell the labels apart. Received: texts whose latents are all alike.")
    capacity, deeper = levels[1], [*levels[:1], *levels[2:]] if legacy else levels[2:]
    isolation = 1 - mean(level - capacity for level in deeper) if deeper else 1.0
    roots, accuracies = [int(tree.tree_.feature[0])], [capacity]
    for _ in range(max(removed)):
        matrix = _without(matrix, roots[-1])
        stump = DecisionTreeClassifier(max_depth=1, random_state=seed).fit(matrix, truth.numpy())
        accuracies.append(_by_level(stump, matrix, truth)[-1])
        if stump.tree_.node_count == 1:  # nothing is left that tells them apart
            accuracies += accuracies[-1:] * (max(removed) - len(roots))
            break
        roots.append(int(stump.tree_.feature[0]))
    local = {p: 2 * (capacity - accuracies[p]) for p in removed}
    score = {p: capacity * (value + isolation) / 2 for p, value in local.items()}
    return Monosemanticity(capacity, isolation, local, score, roots, levels)


def _by_level(tree: Any, matrix: Any, truth: Tensor) -> list[float]:
    """Accuracy of a tree cut after each level, from none to all."""
    path = tree.decision_path(matrix)  # nodes of a row stand in the order of the levels
    starts, nodes = torch.from_numpy(path.indptr).long(), torch.from_numpy(path.indices).long()
    says = torch.from_numpy(tree.tree_.value[:, 0].argmax(-1)).long()
    last = starts.diff() - 1
    cut = [nodes[starts[:-1] + last.clamp(max=level)] for level in range(tree.get_depth() + 1)]
    return [float((says[one] == truth).double().mean()) for one in cut]


def _without(matrix: Any, latent: int) -> Any:
    """The same with a column of zeros."""
    left = matrix.copy()
    if not hasattr(left, "indptr"):
        left[:, latent] = 0
    else:
        left.data[left.indptr[latent] : left.indptr[latent + 1]] = 0
    return left
