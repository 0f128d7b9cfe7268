import pytest
import torch

from sae_transformers.latents.diffmean import fit_diffmean


def test_diffmean_is_the_difference_of_the_means() -> None:
    hidden, labels = torch.randn(40, 6), torch.arange(40) % 3 == 0
    expected = hidden[labels].mean(0) - hidden[~labels].mean(0)
    torch.testing.assert_close(fit_diffmean(hidden, labels.long()), expected)


def test_diffmean_finds_a_planted_direction_and_ignores_a_shift() -> None:
    planted, labels = torch.randn(6), torch.arange(4000) % 2
    hidden = torch.randn(4000, 6) + labels[:, None] * planted
    found = fit_diffmean(hidden, labels)
    torch.testing.assert_close(found, planted, atol=0.15, rtol=0)
    torch.testing.assert_close(fit_diffmean(hidden + 5, labels), found, atol=1e-4, rtol=0)
    assert fit_diffmean(hidden.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize(
    ("hidden", "labels", "received"),
    [
        (torch.zeros(3, 2), torch.zeros(2), r"labels \(2,\)"),
        (torch.zeros(2, 2), torch.tensor([1, 1]), r"\[1\]"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -100]), "-100"),
    ],
)
def test_diffmean_refuses(hidden: torch.Tensor, labels: torch.Tensor, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        fit_diffmean(hidden, labels)
