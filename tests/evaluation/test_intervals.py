import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from sae_transformers.evaluation.detection.metrics import auroc
from sae_transformers.evaluation.intervals import percentiles, resample_counts, weighted_aurocs, weighted_f1


def test_counts_are_draws_with_replacement() -> None:
    counts = resample_counts(50, resamples=400, seed=3)
    assert counts.shape == (400, 50) and bool((counts.sum(1) == 50).all())
    assert torch.equal(counts, resample_counts(50, resamples=400, seed=3))
    assert not torch.equal(counts, resample_counts(50, resamples=400, seed=4))
    # Binomial(50, 1/50): mean 1, variance 0.98
    assert float(counts.mean()) == 1.0 and float(counts.var()) == pytest.approx(0.98, abs=0.05)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = resample_counts(400, resamples=2000)
    low, high = percentiles(counts @ x / 400)
    half = 1.96 * float(x.std()) / 20
    assert low == pytest.approx(float(x.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(x.mean()) + half, abs=0.02)


def test_nan_does_not_count() -> None:
    assert percentiles(torch.tensor([torch.nan, 2.0, torch.nan, 2.0])) == (2.0, 2.0)
    assert percentiles(torch.tensor([torch.nan])) == (None, None)


def test_weighted_numbers_are_those_of_repeated_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(40, generator=generator).mul(3).round()  # with ties
    labels = torch.randint(2, (40,), generator=generator)
    predicted = (scores > 0).long()
    counts = resample_counts(40, resamples=20)
    areas, f1 = weighted_aurocs(scores, labels, counts), weighted_f1(predicted, labels, counts)
    for row, area, score in zip(counts, areas, f1, strict=True):
        again = torch.arange(40).repeat_interleave(row.long())
        assert float(area) == pytest.approx(auroc(scores[again], labels[again]), abs=1e-12)
        assert float(area) == pytest.approx(roc_auc_score(labels[again], scores[again]), abs=1e-12)
        assert float(score) == pytest.approx(f1_score(labels[again], predicted[again]), abs=1e-12)


def test_one_class_has_no_auroc() -> None:
    counts = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = weighted_aurocs(torch.tensor([1.0, 0.0]), torch.tensor([1, 0]), counts)
    assert bool(found[0].isnan()) and float(found[1]) == 1.0


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 3, "resamples": 0}])
def test_nothing_to_draw(options: dict) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        resample_counts(**options)
