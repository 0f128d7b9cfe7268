import pytest
import torch
from sklearn.tree import DecisionTreeClassifier

from sae_transformers.evaluation.detection.decision_trees import concept_tree
from sae_transformers.latents.sparse_codes import SparseCodes


def codes(n: int = 80, d: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n, d, generator=generator).sub(0.5).relu()
    return dense, torch.randint(2, (n,), generator=generator)


def test_one_latent_that_holds_the_concept_makes_one_split() -> None:
    dense, labels = codes()
    dense[:, 17] = labels * 2.0
    found = concept_tree(SparseCodes.from_dense(dense), labels)
    assert (found.depth, found.nodes, found.root, found.top_splits) == (1, 3, 17, 1)
    assert found.top_share(17) == 1.0 and found.top_share(3) == 0.0
    assert found.accuracy is None and found.predicted is None


def test_the_tree_is_scikit_learns_of_the_dense_matrix() -> None:
    dense, labels = codes(120)
    other, truth = codes(50, seed=1)
    found = concept_tree(SparseCodes.from_dense(dense), labels, SparseCodes.from_dense(other), truth, seed=4)
    tree = DecisionTreeClassifier(criterion="gini", random_state=4).fit(dense.numpy(), labels.numpy())
    assert (found.depth, found.nodes) == (tree.get_depth(), tree.tree_.node_count)
    assert found.accuracy == pytest.approx(tree.score(other.numpy(), truth.numpy()))
    assert found.predicted is not None and found.predicted.tolist() == tree.predict(other.numpy()).tolist()
    inner, level = [], [0]
    for _ in range(3):  # the first three levels, by hand
        inner += [int(tree.tree_.feature[node]) for node in level if tree.tree_.feature[node] >= 0]
        level = [
            int(child[node])
            for node in level
            if tree.tree_.feature[node] >= 0
            for child in (tree.tree_.children_left, tree.tree_.children_right)
        ]
    assert found.top_latents.tolist() == inner and found.root == inner[0] and 1 < found.top_splits <= 7
    assert found.top_share(inner[0]) == inner.count(inner[0]) / len(inner)


def test_dense_columns_and_a_depth() -> None:
    dense, labels = codes(120)
    whole, sparse = concept_tree(dense, labels), concept_tree(SparseCodes.from_dense(dense), labels)
    assert (whole.depth, whole.nodes) == (sparse.depth, sparse.nodes)
    assert concept_tree(dense, labels, max_depth=2).depth == 2
    alone = concept_tree(torch.zeros(120, 1), labels)  # nothing to split by
    assert (alone.depth, alone.nodes, alone.root, alone.top_splits) == (0, 1, None, 0) and alone.top_share(0) == 0.0


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.zeros(80), "80 of them 0, 0 of them 1"),
        (torch.ones(79), "79 labels"),
        (torch.full((80,), 2), "80 labels"),
    ],
)
def test_bad_labels_are_refused(labels: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        concept_tree(SparseCodes.from_dense(codes()[0]), labels)
