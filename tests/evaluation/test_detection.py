import pytest
import torch
from sklearn.metrics import roc_auc_score

from sae_transformers.evaluation.detection import auroc, mean_by_text


@pytest.mark.parametrize("values", [None, 2, 5, 1], ids=["no ties", "two values", "five values", "one value"])
@pytest.mark.parametrize("seed", range(4))
def test_auroc_equals_scikit_learn_with_ties_and_imbalance(values: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(211, generator=generator) < 0.2).long()
    scores = torch.randn(211, generator=generator)
    if values is not None:
        scores = torch.randint(values, (211,), generator=generator).float()
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auroc_of_known_orders() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0]), labels) == 1.0
    assert auroc(torch.tensor([4.0, 3.0, 2.0, 1.0]), labels) == 0.0
    assert auroc(torch.tensor([1.0, 3.0, 3.0, 4.0]), labels) == 0.875  # one tie among four pairs


@pytest.mark.parametrize(
    ("scores", "labels", "received"),
    [
        (torch.zeros(3), torch.tensor([0, 1]), r"\(3,\)"),
        (torch.tensor([0.0, torch.nan]), torch.tensor([0, 1]), "1 that are not"),
        (torch.zeros(2), torch.tensor([0, 2]), r"\[0, 2\]"),
        (torch.zeros(2), torch.tensor([1, 1]), "2 positive, 0 negative"),
    ],
)
def test_auroc_refuses(scores: torch.Tensor, labels: torch.Tensor, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        auroc(scores, labels)


def test_mean_by_text_equals_a_loop() -> None:
    values, index = torch.randn(50, 3), torch.randint(4, (50,))
    index[:4] = torch.arange(4)
    expected = torch.stack([values[index == i].mean(0) for i in range(4)])
    torch.testing.assert_close(mean_by_text(values, index, 4), expected)
    torch.testing.assert_close(mean_by_text(values[:, 0], index, 4), expected[:, 0])


def test_mean_by_text_refuses_a_text_without_tokens() -> None:
    with pytest.raises(ValueError, match="1 texts without"):
        mean_by_text(torch.zeros(2), torch.tensor([0, 2]), 3)
