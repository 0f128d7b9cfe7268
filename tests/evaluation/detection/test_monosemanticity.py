"""The Feature Monosemanticity Score, by hand."""

from __future__ import annotations

import pytest
import torch

from sae_transformers.evaluation.detection.monosemanticity import monosemanticity
from sae_transformers.latents.sparse_codes import SparseCodes

# Latent 0 is right for 7 of 8 texts, latent 1 tells the text that it misses from those it is mixed up with, latent 2
# is right for 6 of 8, latent 3 for 5 of 8.
LABELS = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
LATENTS = torch.tensor([
    [2.0, 0.0, 1.0, 1.0],
    [2.0, 0.0, 1.0, 1.0],
    [2.0, 0.0, 1.0, 0.0],
    [0.0, 3.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.0, 1.0],
    [0.0, 0.0, 1.0, 0.0],
])  # fmt: skip


@pytest.mark.parametrize("sparse", [False, True])
def test_by_hand(sparse: bool) -> None:
    codes = SparseCodes.from_dense(LATENTS) if sparse else LATENTS
    found = monosemanticity(codes, LABELS, (1, 2, 3))
    # The first split, at latent 0, has 7 of 8 right; the second, at latent 1, all.
    assert list(found.levels) == [0.5, 7 / 8, 1.0] and found.capacity == 7 / 8
    assert found.isolation == pytest.approx(1 - (1 - 7 / 8))
    # Without latent 0 the best split is at latent 2, 6 of 8; without both at latent 1, 5 of 8; then at latent 3, 5.
    assert list(found.roots) == [0, 2, 1, 3]
    expected = {1: 2 * (7 / 8 - 6 / 8), 2: 2 * (7 / 8 - 5 / 8), 3: 2 * (7 / 8 - 5 / 8)}
    assert found.local == pytest.approx(expected)
    assert found.score == pytest.approx({p: 7 / 8 * (value + 7 / 8) / 2 for p, value in expected.items()})
    # The authors' code averages over the level without a split too.
    legacy = monosemanticity(codes, LABELS, (1,), legacy=True)
    assert (
        legacy.isolation == pytest.approx(1 - ((0.5 - 7 / 8) + (1 - 7 / 8)) / 2) and legacy.local[1] == found.local[1]
    )


def test_one_latent_alone_scores_1_and_one_that_all_share_less() -> None:
    alone = torch.zeros(8, 3)
    alone[:, 1] = LABELS.float()
    found = monosemanticity(alone, LABELS)
    assert (found.capacity, found.isolation) == (1.0, 1.0)
    assert found.local == {1: 1.0, 5: 1.0} and found.score == {1: 1.0, 5: 1.0} and list(found.roots) == [1]
    shared = LABELS.float()[:, None].expand(8, 3).contiguous()
    found = monosemanticity(shared, LABELS, (1, 2, 3))
    assert found.score == {1: 0.5, 2: 0.5, 3: 1.0}  # nothing local until the third copy is gone


def test_the_levels_are_those_of_the_tree_cut_by_hand() -> None:
    from sklearn.tree import DecisionTreeClassifier

    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(200, 12, generator=generator) * (torch.rand(200, 12, generator=generator) < 0.4)
    labels = ((latents[:, 0] + latents[:, 1] + torch.randn(200, generator=generator) / 4) > 0.4).long()
    found = monosemanticity(latents, labels, seed=3)
    tree = DecisionTreeClassifier(random_state=3).fit(latents.numpy(), labels.numpy()).tree_

    def said(row: list[float], levels: int) -> int:
        node = 0
        for _ in range(levels):
            if tree.children_left[node] >= 0:
                left = row[tree.feature[node]] <= tree.threshold[node]
                node = (tree.children_left if left else tree.children_right)[node]
        return int(tree.value[node][0].argmax())

    for depth, accuracy in enumerate(found.levels):
        right = [said(row, depth) == label for row, label in zip(latents.tolist(), labels.tolist(), strict=True)]
        assert accuracy == pytest.approx(sum(right) / 200), depth
    assert len(found.levels) == tree.max_depth + 1 and found.levels[-1] == 1.0 and len(found.roots) == 6


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"removed=\[0\]"):
        monosemanticity(LATENTS, LABELS, (0,))
    with pytest.raises(ValueError, match="all alike"):
        monosemanticity(torch.ones(8, 4), LABELS)
    with pytest.raises(ValueError, match="8 of them 0"):
        monosemanticity(LATENTS, torch.zeros(8))
