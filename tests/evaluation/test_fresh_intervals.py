"""Intervals for fresh prompts hold what fresh prompts give, and intervals of the mean would not."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from sae_transformers.evaluation.fresh_intervals import (
    Number,
    fresh_mean,
    fresh_perplexity,
    fresh_perplexity_ratio,
    fresh_ratio,
    fresh_share,
    t_quantile,
)
from tests.covering import fast


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.70620),
        (0.95, 2, 2.91999),
        (0.95, 3, 2.35336),
        (0.95, 7, 1.89458),
        (0.975, 7, 2.36462),
        (0.95, 1000, 1.64638),
    ],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=1e-5)
    assert t_quantile(1 - probability, freedom) == pytest.approx(-t_quantile(probability, freedom))


def covered(number: Number, value: float) -> bool:
    assert number.low is not None and number.high is not None
    return number.low <= value <= number.high


def test_the_interval_holds_a_fresh_mean_as_often_as_it_says() -> None:
    values = torch.randn(4000, 2, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [fresh_mean(seen, 0.9) for seen, _ in values]
    hits = [covered(one, float(fresh.mean())) for one, (_, fresh) in zip(found, values, strict=True)]
    assert 0.89 < sum(hits) / len(hits) < 0.94
    narrow = [covered(fresh_mean(seen, 0.9, 10**9), float(fresh.mean())) for seen, fresh in values]
    assert sum(narrow) / len(narrow) < 0.8  # of the true mean


@pytest.mark.slow
def test_it_holds_where_a_quarter_of_the_prompts_do_all_of_the_moving() -> None:
    source = torch.Generator().manual_seed(0)
    values = torch.randn(4000, 2, 24, generator=source, dtype=torch.float64)
    values *= torch.rand(4000, 2, 24, generator=source) < 0.25
    hits = [covered(fresh_mean(seen, 0.9), float(fresh.mean())) for seen, fresh in values]
    plain = []
    for seen, fresh in values:
        half = t_quantile(0.95, 23) * float(seen.std()) * math.sqrt(2 / 24)
        plain.append(abs(float(fresh.mean() - seen.mean())) <= half)
    assert sum(plain) / len(plain) < 0.87 < 0.89 < sum(hits) / len(hits)


def test_the_interval_of_many_fresh_prompts_is_that_of_the_mean() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    wide, narrow = fresh_mean(values, 0.9), fresh_mean(values, 0.9, 10**9)
    assert wide.value == narrow.value == 1.5 and wide.n == 8
    half = 1.89458 * math.sqrt(0.25 * 8.5 / 7 / 8)  # kurtosis 1: no fewer degrees of freedom
    assert narrow.high == pytest.approx(1.5 + half, abs=1e-4)
    assert wide.high == pytest.approx(1.5 + half * math.sqrt(2), abs=1e-4)


@pytest.mark.parametrize("share", fast([0.02, 0.3, 0.9], 0.02))
def test_shares_near_an_end_have_an_interval_too(share: float) -> None:
    drawn = torch.rand(600, 2, 20, generator=torch.Generator().manual_seed(1)) < share
    hits = [covered(fresh_share(seen, 0.9), float(fresh.float().mean())) for seen, fresh in drawn.double()]
    assert sum(hits) / len(hits) > 0.88


def test_a_share_of_nothing_is_not_a_point() -> None:
    found = fresh_share(torch.zeros(20), 0.9)
    assert (found.value, found.low) == (0.0, 0.0) and found.high is not None and 0 < found.high < 0.2
    change = fresh_share(torch.zeros(20), 0.9, kinds=(-1, 0, 1))
    assert change.low is not None and change.high is not None and change.low < 0 < change.high


@pytest.mark.parametrize("values", [[0.0, 2.0], [0.5], [-1.0], []])
def test_other_values_are_no_shares(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"Received: \["):
        fresh_share(torch.tensor(values), 0.9)


def test_ratios_and_perplexities_are_of_sums_and_hold_fresh_ones() -> None:
    source = numpy.random.default_rng(2)
    counts = torch.from_numpy(source.integers(5, 30, (1500, 2, 16))).double()
    sums = counts * torch.from_numpy(source.gamma(4.0, 0.5, (1500, 2, 16)))
    found = [fresh_ratio(a[0], b[0], 0.9) for a, b in zip(sums, counts, strict=True)]
    assert found[0].value == pytest.approx(float(sums[0, 0].sum() / counts[0, 0].sum()))
    fresh = (sums[:, 1].sum(-1) / counts[:, 1].sum(-1)).tolist()
    share = sum(covered(one, value) for one, value in zip(found, fresh, strict=True)) / len(fresh)
    assert 0.88 < share < 0.94
    perplexity = fresh_perplexity(sums[0, 0], counts[0, 0], 0.9)
    assert perplexity.value == pytest.approx(math.exp(found[0].value))
    ratio = fresh_perplexity_ratio(sums[0, 0], counts[0, 0], sums[0, 0], counts[0, 0], 0.9)
    assert ratio == Number(1.0, 1.0, 1.0, 16)


def test_few_prompts_and_zeros_have_no_interval() -> None:
    few = torch.ones(3, dtype=torch.float64)
    assert fresh_mean(few, 0.9) == Number(1.0, None, None, 3)
    assert fresh_ratio(torch.zeros(8), torch.ones(8), 0.9) == Number(0.0, None, None, 8)
    assert fresh_perplexity(few, few, 0.9) == Number(math.e, None, None, 3)
