import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, roc_auc_score

from sae_transformers.evaluation.classification import (
    bootstrap_interval,
    calibration_error,
    classification_metrics,
    paired_t_test,
    pairwise_accuracy,
    student_tail,
    summary,
)


@pytest.mark.parametrize("seed", range(3))
def test_binary_equals_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(200, generator=generator), (torch.rand(200, generator=generator) < 0.3).long()
    found, guess = classification_metrics(logits[:, None], labels, "binary"), (logits > 0).long()
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, guess))
    assert found["f1"] == pytest.approx(f1_score(labels, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, guess, average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, logits))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, logits.double().sigmoid()))


def test_several_classes_equal_scikit_learn() -> None:
    logits, labels = torch.randn(200, 4, dtype=torch.float64), torch.randint(4, (200,))
    found, shares = classification_metrics(logits, labels, "multi_class"), logits.softmax(-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(-1)))
    assert found["f1"] == found["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(-1), average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, shares, multi_class="ovr"))
    assert found["brier"] == pytest.approx(float((shares - F.one_hot(labels, 4)).square().sum(-1).mean()))


def test_several_labels_equal_scikit_learn() -> None:
    logits, labels = torch.randn(100, 3), torch.randint(2, (100, 3))
    found = classification_metrics(logits, labels, "multi_label")
    assert found["f1"] == pytest.approx(f1_score(labels, (logits > 0).long(), average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, logits, average="macro"))
    assert found["accuracy"] == pytest.approx(float(((logits > 0) == labels).double().mean()))


def test_pairs_have_one_number_for_accuracy_and_f1() -> None:
    """N pairs of which m are right and none is a tie: accuracy and both F1 are m / N."""
    logits = torch.randn(50, 2)
    found, right = classification_metrics(logits, None, "pairwise"), int((logits[:, 0] > logits[:, 1]).sum())
    assert found["accuracy"] == found["macro_f1"] == found["f1"] == pytest.approx(right / 50)
    scores, labels = logits.T.reshape(-1), torch.arange(100) < 50
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert pairwise_accuracy(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 1, 4])) == pytest.approx(1 / 3)


def test_calibration_error_equals_a_loop() -> None:
    confidence, correct = torch.rand(300, dtype=torch.float64) / 2 + 0.5, torch.rand(300) < 0.7
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    assert calibration_error(confidence, correct) == pytest.approx(total)
    assert calibration_error(torch.tensor([0.8] * 5), torch.tensor([True] * 4 + [False])) == pytest.approx(0, abs=1e-7)


def test_a_missing_class_has_no_auroc() -> None:
    assert math.isnan(classification_metrics(torch.randn(5), torch.ones(5), "binary")["auroc"])


@pytest.mark.parametrize(
    ("logits", "labels", "objective", "received"),
    [
        (torch.zeros(3), torch.zeros(3), "ranking", "'ranking'"),
        (torch.zeros(3), torch.zeros(2), "binary", r"labels \(2,\)"),
        (torch.zeros(3, 2), torch.zeros(3), "multi_label", r"labels \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3), "pairwise", r"labels \(3,\)"),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2), "binary", "1 that are not"),
        (torch.zeros(2), torch.tensor([0, 2]), "binary", r"\[0, 2\]"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "multi_class", r"\[0, 2\]"),
    ],
)
def test_bad_input_is_refused(logits: torch.Tensor, labels: torch.Tensor, objective: str, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        classification_metrics(logits, labels, objective)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("n", [2, 3, 6, 40])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.4, 3.0])
def test_paired_test_equals_scipy(alternative: str, n: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (a + shift).tolist(), b.tolist()
    found, expected = (
        paired_t_test(first, second, alternative),
        stats.ttest_rel(first, second, alternative=alternative),
    )
    assert found.t == pytest.approx(expected.statistic) and found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_paired_test_at_its_limits() -> None:
    assert paired_t_test([2, 3], [1, 2]).p == 0.0  # the same difference always
    assert math.isnan(paired_t_test([1, 2], [1, 2]).p)
    assert student_tail(0.0, 5) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="1 and 1"):
        paired_t_test([1], [2])
    with pytest.raises(ValueError, match="'more'"):
        paired_t_test([1, 2], [2, 1], "more")


def test_summary_has_students_interval() -> None:
    values = [0.61, 0.64, 0.6, 0.66, 0.63, 0.62]
    found = summary([{"f1": value, "n": 1.0} for value in values])["f1"]
    low, high = stats.t.interval(0.95, 5, loc=stats.tmean(values), scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert (found.mean, found.std, found.n) == (
        pytest.approx(stats.tmean(values)),
        pytest.approx(stats.tstd(values)),
        6,
    )
    assert math.isnan(summary([{"f1": 0.5}])["f1"].std)
    undefined = summary([{"f1": value} for value in [*values, math.nan]])["f1"]
    assert (undefined.low, undefined.n) == (found.low, 6)
    assert math.isnan(summary([{"f1": math.nan}])["f1"].mean)
    with pytest.raises(ValueError, match="'acc'"):
        summary([{"f1": 0.5}, {"acc": 0.5}])


def test_bootstrap_interval() -> None:
    values = torch.randn(400, dtype=torch.float64) + 3
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    rows = (values, -values)  # resampled together
    assert bootstrap_interval(rows, lambda a, b: float((a + b).sum()), resamples=20) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"\[3\], \[4\]"):
        bootstrap_interval((torch.zeros(3), torch.zeros(4)))
    with pytest.raises(ValueError, match="level=1"):
        bootstrap_interval(values, level=1)
    with pytest.raises(ValueError, match="all 5 resamples"):
        bootstrap_interval(values, lambda _: math.nan, resamples=5)
