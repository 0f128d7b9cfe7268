"""Intervals for what the same measurement gives on fresh prompts, and not for a mean that nobody sees.

A mean of n prompts and one of m fresh prompts both vary: their difference has the variance s^2 (1/n + 1/m). An
interval for the true mean alone (m without end) would hold the fresh value in some 75 % of cases where 90 % is said.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy
from torch import Tensor

LEAST = 4  # prompts, for a variance that says something
DRAWS = 20_000  # of shares, whose ends are then right to a hundredth
FURTHEST, HALVINGS = 1000.0, 50  # of the search for a quantile
NODES, WEIGHTS = numpy.polynomial.legendre.leggauss(64)
UNSEEN = 0.5  # observations more, as far away as the furthest


class Number(NamedTuple):
    """A measured number. low, high: its interval, None where there is none. n: prompts or texts that it is over."""

    value: float
    low: float | None
    high: float | None
    n: int


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, for 1 degree of freedom or more, which need not be whole.

    With t = sqrt(v) tan(a) its distribution is 1/2 + Gamma((v + 1) / 2) / (sqrt(pi) Gamma(v / 2)) * integral of
    cos(x)^(v - 1) from 0 to a, which is smooth; the quantile is found by halving.
    """
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, FURTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        angle = math.atan(middle / math.sqrt(freedom))
        powers = numpy.cos((NODES + 1) * angle / 2) ** (freedom - 1)
        below = 0.5 + scale * angle / 2 * float(WEIGHTS @ powers)
        low, high = (middle, high) if below < probability else (low, middle)
    return (low + high) / 2


def fresh_mean(values: Tensor, level: float, fresh: int | None = None) -> Number:
    """Mean of (n,) values, with the interval of the mean of `fresh` others (by default as many as these)."""
    half = _half(values - values.mean(), level, fresh)
    value = float(values.mean())
    return Number(value, None if half is None else value - half, None if half is None else value + half, len(values))


def fresh_ratio(sums: Tensor, counts: Tensor, level: float, fresh: int | None = None) -> Number:
    """sum of sums / sum of counts, both (n,) and not negative, with the interval on the logarithmic scale.

    The ratio's error is linear in each prompt's (sum - ratio * count) / mean count. Where all is 0 there is no
    interval.
    """
    value = float(sums.sum() / counts.sum())
    half = _half((sums - value * counts) / counts.mean(), level, fresh)
    if half is None or value <= 0:
        return Number(value, None, None, len(sums))
    return Number(value, value * math.exp(-half / value), value * math.exp(half / value), len(sums))


def fresh_perplexity(losses: Tensor, tokens: Tensor, level: float, fresh: int | None = None) -> Number:
    """`exp(sum losses / sum tokens)` of (n,) prompts."""
    mean = float(losses.sum() / tokens.sum())
    return _exponential(mean, _half((losses - mean * tokens) / tokens.mean(), level, fresh), len(losses))


def fresh_perplexity_ratio(
    losses: Tensor, tokens: Tensor, base_losses: Tensor, base_tokens: Tensor, level: float, fresh: int | None = None
) -> Number:
    """The perplexity over another's on the same prompts, paired."""
    mean, base = float(losses.sum() / tokens.sum()), float(base_losses.sum() / base_tokens.sum())
    errors = (losses - mean * tokens) / tokens.mean() - (base_losses - base * base_tokens) / base_tokens.mean()
    return _exponential(mean - base, _half(errors, level, fresh), len(losses))


def fresh_share(
    values: Tensor, level: float, fresh: int | None = None, *, kinds: tuple[int, ...] = (0, 1), seed: int = 0
) -> Number:
    """Mean of (n,) values that are whole numbers of `kinds`: of hits (0, 1), or of changes of hits (-1, 0, 1).

    How often each occurs among the fresh ones is drawn from the Dirichlet-multinomial distribution under Jeffreys'
    prior: an interval of a normal distribution has no width where all values are the same.

    Raises:
        ValueError: another value, or none.
    """
    n, counts = len(values), numpy.array([int((values == kind).sum()) for kind in kinds])
    if not n or counts.sum() != n:
        raise ValueError(f"Expected values of {kinds}, one or more. Received: {sorted(set(values.tolist()))[:5]}.")
    source, m = numpy.random.default_rng(seed), fresh or n
    means = source.multinomial(m, source.dirichlet(counts + 0.5, DRAWS)) @ numpy.array(kinds) / m
    low, high = numpy.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf").tolist()
    return Number(float(values.double().mean()), low, high, n)


def _half(errors: Tensor, level: float, fresh: int | None) -> float | None:
    """Half of the interval's width, from (n,) errors of sum 0.

    Where few prompts do all of the moving (a gate that seldom opens), the variance s^2 of n prompts is as uncertain as
    that of those few. Two corrections, both small for a normal distribution: degrees of freedom by the kurtosis,
    2 n / (kurtosis - (n - 3) / (n - 1)), which is what the variance of s^2 stands for; and half an observation more
    that is as far away as the furthest.
    """
    n, squares = len(errors), errors.double().square()
    if n < LEAST:
        return None
    total = float(squares.sum())
    if total == 0:
        return 0.0
    kurtosis = float(squares.square().mean() / squares.mean().square())
    freedom = min(n - 1.0, max(2.0, 2 * n / max(kurtosis - (n - 3) / (n - 1), 1e-9)))
    variance = (total + UNSEEN * float(squares.max())) / (n - 1)
    return t_quantile((1 + level) / 2, freedom) * math.sqrt(variance * (1 / n + 1 / (fresh or n)))


def _exponential(mean: float, half: float | None, n: int) -> Number:
    mean = min(mean, 700.0)
    if half is None:
        return Number(math.exp(mean), None, None, n)
    return Number(math.exp(mean), math.exp(max(mean - half, -700.0)), math.exp(min(mean + half, 700.0)), n)
