"""How far effects can be trusted: their agreement with ablation, and what the strongest pairs are enough for.

Sparse feature circuits (https://arxiv.org/abs/2403.19647), section 4: of a target `m`, faithfulness of a set C of
pairs is (m(C) - m(none)) / (m(all) - m(none)), where all pairs that are not in C are set to 0 and what the SAEs do not
reconstruct stays; completeness asks the same of what is left without C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .effects import ScaledLatents

NAMES: tuple[str, ...] = ("keep", "remove", "keep_random", "remove_random")


class Agreement(NamedTuple):
    """How effects go along with another method's, over n pairs.

    against: the other method. spearman: correlation of their ranks. pearson: of their values. same_sign: share of
    pairs whose effects have one sign. NaN where fewer than two pairs or two values differ.
    """

    against: str
    pairs: int
    spearman: float
    pearson: float
    same_sign: float


def agreement(effects: Tensor, others: Tensor, against: str) -> Agreement:
    """
    Args:
        effects, others: (n,), of the same pairs.
        against: the method of the others.
    """
    same = (effects.sign() == others.sign()).double().mean() if len(effects) else torch.tensor(torch.nan)
    return Agreement(
        against, len(effects), rank_correlation(effects, others), correlation(effects, others), float(same)
    )


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of (n,) and (n,); NaN where one does not vary."""
    a, b = (one.double() - one.double().mean() for one in (a, b))
    return float(a @ b / (a.norm() * b.norm())) if len(a) else float("nan")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing the mean of theirs."""
    return correlation(_ranks(a), _ranks(b))


def _ranks(values: Tensor) -> Tensor:
    _, of, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[of]


@dataclass(frozen=True)
class FaithfulnessCurve:
    """What becomes of the target when the n strongest pairs are all that is kept, or are removed.

    Args:
        n: numbers of pairs, 0 and all of them among these.
        keep, remove: the target for each n, by the strongest pairs. keep_random, remove_random: likewise by pairs in
            random order, the mean of `draws` orders.
        whole, none: the target with all pairs, and with none.
    """

    n: list[int]
    keep: list[float]
    remove: list[float]
    keep_random: list[float]
    remove_random: list[float]
    whole: float
    none: float
    draws: int

    def shares(self, of: str) -> list[float]:
        """`keep`, `remove`, ... as shares of what lies between none of the pairs (0) and all (1); NaN where nothing
        does."""
        between = self.whole - self.none
        return [(value - self.none) / between if between else float("nan") for value in self.values(of)]

    def values(self, of: str) -> list[float]:
        """`keep`, `remove`, ... as the target's values."""
        return dict(zip(NAMES, (self.keep, self.remove, self.keep_random, self.remove_random), strict=True))[of]

    def area(self, of: str) -> float:
        """The mean share over the curve's points but its ends, which are known: n are powers of two, so this is the
        area over log n. Of `keep` 1 is best, of `remove` 0 or less."""
        inner = self.shares(of)[1:-1]
        return sum(inner) / len(inner) if inner else float("nan")

    def needed(self, share: float = 0.8) -> int | None:
        """The least n whose pairs alone keep this share; None where the curve never reaches it."""
        return next((n for n, kept in zip(self.n, self.shares("keep"), strict=True) if kept >= share), None)

    def rows(self) -> list[dict[str, float]]:
        """One for each n: n, and the shares of the four curves."""
        columns = {"n": self.n, **{name: self.shares(name) for name in NAMES}}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the target's values, not shares."""
        return asdict(self)


def curve_points(n_pairs: int) -> list[int]:
    """0, the powers of two below `n_pairs`, and `n_pairs`."""
    powers = [1 << power for power in range(max(n_pairs, 1).bit_length()) if 1 << power < n_pairs]
    return [0, *powers, n_pairs] if n_pairs else [0]


@torch.no_grad()
def faithfulness_curve(
    scaled: ScaledLatents,
    effects: Tensor,
    *,
    draws: int,
    seed: int,
    tokens_per_batch: int,
    report: Callable[[int], object] | None = None,
) -> FaithfulnessCurve:
    """Keep and remove the pairs with the largest effects by magnitude, and as many at random.

    With pairs of several SAEs all are cut at once; a later SAE reads what the earlier ones leave. Latents that only
    then become active are cut where pairs are kept, and stay where pairs are removed.

    Args:
        effects: (P,), of `scaled.pairs`.
        draws: random orders.
        report: called with the rows of each batch.
    """
    n_pairs = len(effects)
    points = curve_points(n_pairs)
    generator = torch.Generator().manual_seed(seed)
    orders = [effects.abs().argsort(descending=True, stable=True)]
    orders += [torch.randperm(n_pairs, generator=generator) for _ in range(draws)]
    chosen = torch.zeros(len(orders) * len(points), n_pairs, dtype=torch.bool)
    for row, (order, n) in enumerate((order, n) for order in orders for n in points):
        chosen[row, order[:n]] = True

    def run(factors: Tensor, others: float) -> Tensor:
        found = []
        for part in scaled.in_batches(len(factors), tokens_per_batch):
            found.append(scaled.scores(factors[part], others).double().cpu())
            if report is not None:
                report(len(found[-1]))
        return torch.cat(found).view(len(orders), len(points))

    kept = run(chosen.to(scaled.pairs.activation.dtype), 0.0)
    removed = run((~chosen).to(scaled.pairs.activation.dtype), 1.0)
    random = [_mean(one[1:]) for one in (kept, removed)]
    return FaithfulnessCurve(
        points, kept[0].tolist(), removed[0].tolist(), random[0], random[1], float(removed[0, 0]), float(kept[0, 0]),
        draws,
    )  # fmt: skip


def _mean(rows: Tensor) -> list[float]:
    return rows.mean(0).tolist() if len(rows) else [float("nan")] * rows.shape[1]


def pooled_curves(curves: Sequence[FaithfulnessCurve]) -> list[dict[str, float]]:
    """The curves of several texts as one: a row for each n that all of them have, with n and the four shares.

    A share is that of sums over the texts, (sum m(C) - sum m(none)) / (sum m(all) - sum m(none)): a text whose pairs
    hardly move the target would else count most. Points that are a text's number of all pairs are left out.
    """
    common = sorted(set.intersection(*(set(curve.n[:-1]) for curve in curves))) if curves else []
    between = sum(curve.whole - curve.none for curve in curves)
    found = []
    for n in common:
        row: dict[str, float] = {"n": n}
        for name in NAMES:
            total = sum(curve.values(name)[curve.n.index(n)] - curve.none for curve in curves)
            row[name] = total / between if between else float("nan")
        found.append(row)
    return found
