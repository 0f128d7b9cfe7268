"""Draws without a sort against transformers' warpers, which sort."""

from __future__ import annotations

from itertools import chain, cycle, repeat

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sae_transformers.serving.drawing import BLOCK, draw, keep_top_k, pick, stands_above

N_DRAWS = 4000


def scores_of(kind: str, size: int) -> torch.Tensor:
    """(size,), float32: peaked as a language model's, flat as a random one's, or of few different numbers."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(size))
    if kind == "ties":
        return (2 * noise).round() / 2
    return {"peaked": 4 * noise, "flat": 0.05 * noise, "one": torch.where(torch.arange(size) == 3, 0.0, -torch.inf)}[
        kind
    ]


def cut(scores: torch.Tensor, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0) -> torch.Tensor:
    """What transformers leaves of scores (size,), in probabilities."""
    warpers = [
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ]
    ids = torch.zeros(1, 1, dtype=torch.long)
    warped = LogitsProcessorList(warper for warper in warpers if warper)(ids, scores[None].clone())  # pyright: ignore[reportArgumentType]
    return warped[0].double().softmax(-1)


@pytest.mark.parametrize("size", [7, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "one"])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.95, 0.999])
def test_the_tokens_that_top_p_keeps_are_those_of_transformers(kind, size, top_p):
    scores = scores_of(kind, size)
    weights = scores.double().softmax(-1).expand(size, -1)
    mass = torch.where(stands_above(weights, torch.arange(size)), weights, 0.0).sum(-1)
    kept = cut(scores.double(), top_p) > 0
    ours = (weights[0] > 0) & ((mass < top_p) | (mass == 0))
    if kind == "ties":  # which of equal ones are kept depends on the sort
        assert torch.equal(scores[ours].sort().values, scores[kept].sort().values)
    else:
        certain = (mass - top_p).abs() > 1e-12  # beside rounding
        assert torch.equal(ours[certain], kept[certain]) and certain.sum() > 0.9 * size


@pytest.mark.parametrize("options", [
    {}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 0.2}, {"min_p": 1.0},
    {"top_p": 0.6, "min_p": 0.3}, {"top_k": 5}, {"top_k": 5, "top_p": 0.7, "min_p": 0.1},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["peaked", "flat", "ties"])
def test_draws_have_the_probabilities_of_transformers(kind, options):
    """As many draws as fit into one call, of 40 tokens: no kept one is missed for long, none of the others comes, and
    each comes as often as it should within five standard deviations."""
    scores = scores_of(kind, 40)
    wanted = cut(scores.double(), **options)
    groups = scores.unique(return_inverse=True)[1] if kind == "ties" else torch.arange(40)
    wanted = torch.zeros(40, dtype=torch.float64).index_add(0, groups, wanted)
    given = scores.clone()
    if "top_k" in options:
        keep_top_k(given, options["top_k"])
    generator = torch.Generator().manual_seed(1)

    def number() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    top_p, min_p = (torch.full((N_DRAWS,), options.get(name, at)) for name, at in (("top_p", 1.0), ("min_p", 0.0)))
    drawn = draw(given.expand(N_DRAWS, -1), top_p, min_p, [number] * N_DRAWS)
    shares = torch.bincount(groups[drawn], minlength=40).double() / N_DRAWS
    assert not shares[wanted == 0].any()
    deviation = (wanted * (1 - wanted) / N_DRAWS).sqrt()
    assert ((shares - wanted).abs() <= 5 * deviation + 1e-12).all(), (shares, wanted)


def test_rows_of_other_settings_do_not_matter():
    """The same numbers draw the same tokens alone and in any company, whatever the others need."""
    sizes = torch.tensor([1.0, 0.2, 0.9, 1e-6, 0.5]), torch.tensor([0.0, 0.0, 0.1, 0.0, 0.9])
    scores = torch.stack([scores_of(kind, 600) for kind in ("peaked", "flat", "ties", "flat", "peaked")])

    def numbers() -> list:
        draws = torch.rand(5, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
        return [iter(row).__next__ for row in draws]

    together = draw(scores, *sizes, numbers())
    alone = [
        draw(scores[i : i + 1], sizes[0][i : i + 1], sizes[1][i : i + 1], numbers()[i : i + 1])[0] for i in range(5)
    ]
    assert together == alone


def test_each_row_takes_the_numbers_that_it_needs():
    """One for a token that is kept; another each time that one goes."""
    scores = torch.tensor([0.5, 0.3, 0.2]).log()
    for numbers, token, left in (([0.4], 0, 0), ([0.6, 0.99], 1, 1), ([0.9, 0.7, 0.99], 1, 1), ([0.9, 0.1], 0, 0)):
        source = chain(numbers, repeat(0.5, left))
        assert draw(scores[None], torch.tensor([0.6]), torch.zeros(1), [source.__next__]) == [token]


def test_running_sums_pick_a_token_of_weight_at_both_ends():
    weights = torch.zeros(4, 4 * BLOCK)
    weights[0, [5, 700]] = torch.tensor([1e-30, 1.0])
    weights[1, [0, 1023]] = 1.0
    weights[2, 300] = 1e-38
    weights[3] = 1.0
    ends = cycle([[5, 0, 300, 0], [700, 1023, 300, 1023]])
    for number in (0.0, 1 - 2**-53):
        assert pick(weights, torch.full((4,), number, dtype=torch.float64)).tolist() == next(ends)
    shares = (torch.arange(1024) + 0.5) / 1024
    assert pick(weights[3].expand(1024, -1), shares.double()).tolist() == list(range(1024))
