"""The losses beside torch's own, and the numbers that SelfReg's code gives (https://huggingface.co/papers/2502.14133)."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_transformers.training.heads.losses import (
    StackedLosses,
    UnintendedRows,
    binary_losses,
    class_losses,
    top_singular_values,
    unintended_penalty,
)
from sae_transformers.training.heads.settings import METHODS, HeadSettings

F64 = torch.float64


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)[:, None]


def test_binary_forms_equal_torch_and_their_formulas() -> None:
    z, y = torch.randn(3, 20, dtype=F64), (torch.rand(3, 20) < 0.4).double()
    ce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    torch.testing.assert_close(binary_losses(z, y), ce.mean(-1))
    gamma, alpha = column(2.0, 1.0, 0.0), torch.tensor([[0.8, 0.2], [1, 1], [0.5, 0.5]], dtype=F64)
    p = torch.sigmoid(z) * y + torch.sigmoid(-z) * (1 - y)
    focal = torch.where(y > 0.5, alpha[:, 1:], alpha[:, :1]) * (1 - p) ** gamma * ce
    torch.testing.assert_close(binary_losses(z, y, gamma=gamma, alpha=alpha), focal.mean(-1))
    smooth = F.binary_cross_entropy_with_logits(z, y * 0.9 + 0.05)
    torch.testing.assert_close(binary_losses(z, y, smoothing=column(0.1, 0.1, 0.1)).mean(), smooth)
    weights = torch.rand(3, 20, dtype=F64) + 0.1
    torch.testing.assert_close(binary_losses(z, y, weights=weights), (ce * weights).sum(-1) / weights.sum(-1))


@pytest.mark.parametrize("smoothing", [None, 0.1])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_class_losses_equal_torch(smoothing: float | None, weighted: bool, legacy: bool) -> None:
    z, y = torch.randn(2, 12, 3, dtype=F64), torch.randint(3, (2, 12))
    weights = torch.tensor([2.5, 2.5, 1.0], dtype=F64) if weighted else None
    found = class_losses(
        z,
        y,
        smoothing=None if smoothing is None else column(smoothing, smoothing),
        weights=None if weights is None else weights.expand(2, -1),
        legacy=legacy,
    )
    for i in range(2):
        read = z[i].softmax(-1) if legacy else z[i]
        expected = F.cross_entropy(read, y[i], weight=weights, label_smoothing=smoothing or 0.0)
        torch.testing.assert_close(found[i], expected)


def test_class_focal_forms() -> None:
    z, y, w = torch.randn(1, 12, 3, dtype=F64), torch.randint(3, (1, 12)), torch.tensor([[2.5, 2.5, 1.0]], dtype=F64)
    p = z.softmax(-1).gather(-1, y[..., None])[..., 0]
    own = w[0][y]
    expected = (own * (1 - p) ** 2 * -p.log()).sum() / own.sum()
    torch.testing.assert_close(class_losses(z, y, gamma=column(2.0), weights=w)[0], expected)
    ce = F.cross_entropy(z[0].softmax(-1), y[0], weight=w[0], reduction="none")
    legacy = ((1 - torch.exp(-ce)) ** 2 * ce).mean()
    torch.testing.assert_close(class_losses(z, y, gamma=column(2.0), weights=w, legacy=True)[0], legacy)


def test_facts_of_the_published_losses() -> None:
    """Focal at logit 0, label smoothing over the batch, a spectral norm of one row, bounds of softmax taken twice."""
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    quarter = 0.25 * math.log(2)
    assert float(binary_losses(zero, one, gamma=column(2.0))) == pytest.approx(0.1733, abs=5e-5)
    alpha = torch.tensor([[0.8, 0.2]], dtype=F64)
    assert float(binary_losses(zero, one, gamma=column(2.0), alpha=alpha)) == pytest.approx(0.2 * quarter)
    assert float(binary_losses(zero, zero, gamma=column(2.0), alpha=alpha)) == pytest.approx(0.1386, abs=5e-5)

    z, y = torch.randn(1, 16, dtype=F64), (torch.rand(1, 16) < 0.5).double()
    module = torch.nn.CrossEntropyLoss(label_smoothing=0.1)  # what the code calls, on a vector of probabilities
    found = binary_losses(z, y, smoothing=column(0.1), legacy=True)[0]
    torch.testing.assert_close(found, module(torch.sigmoid(z[0]), y[0]))

    weight = torch.randn(2, 1, 30, dtype=F64)
    torch.testing.assert_close(top_singular_values(weight), weight.flatten(1).norm(dim=-1))

    sure = 1000 * torch.eye(3, dtype=F64)[None]
    right, wrong = torch.arange(3)[None], (torch.arange(3)[None] + 1) % 3
    assert float(class_losses(sure, right, legacy=True)) == pytest.approx(0.5514, abs=5e-5)
    assert float(class_losses(sure, wrong, legacy=True)) == pytest.approx(1.5514, abs=5e-5)


@pytest.mark.parametrize("shape", [(4, 3, 20), (4, 20, 3)])
def test_top_singular_values_equal_an_svd(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=F64)
    torch.testing.assert_close(top_singular_values(weight), torch.linalg.matrix_norm(weight, ord=2))


def encoder(m: int = 7, d: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(d, m, dtype=F64), torch.randn(m, dtype=F64), torch.randn(d, dtype=F64)


def test_penalty_and_its_gradient() -> None:
    W, b, b_dec = encoder()
    w = torch.randn(11, 12, dtype=F64, requires_grad=True)  # more rows than one product takes
    S = (w - b_dec) @ W + b
    found = unintended_penalty(w, W, b - b_dec @ W)
    torch.testing.assert_close(found, S.abs().mean(-1))
    (gradient,) = torch.autograd.grad(31.0 * found.sum(), w)
    torch.testing.assert_close(gradient, 31.0 / 7 * (S.sign() @ W.T))
    torch.testing.assert_close(unintended_penalty(w, W, b), (w @ W + b).abs().mean(-1))
    assert float(unintended_penalty(torch.zeros(1, 12, dtype=F64), W, b).detach()) == pytest.approx(
        float(b.abs().mean())
    )


def test_penalty_knows_only_its_own_features() -> None:
    d = 12
    W, b = torch.eye(d, dtype=F64), torch.zeros(d, dtype=F64)
    w = torch.randn(1, d, dtype=F64, requires_grad=True)
    chosen = torch.tensor([1, 4])
    (gradient,) = torch.autograd.grad(unintended_penalty(w, W[:, chosen], b[chosen]).sum(), w)
    others = torch.ones(d, dtype=torch.bool).index_fill(0, chosen, False)
    assert bool((gradient[0, others] == 0).all()) and bool((gradient[0, chosen] != 0).all())


def test_penalty_scales_and_does_not_count_duplicates_in_a_mean() -> None:
    W, b, _ = encoder()
    w = torch.randn(2, 12, dtype=F64)
    twice = (torch.cat([W, W], 1), torch.cat([b, b]))
    torch.testing.assert_close(unintended_penalty(w, *twice), unintended_penalty(w, W, b))
    total = unintended_penalty(w, W, b, "sum")
    torch.testing.assert_close(unintended_penalty(w, *twice, "sum"), 2 * total)
    torch.testing.assert_close(total, 7 * unintended_penalty(w, W, b))


def stacked(*settings: HeadSettings, rows: list | None = None) -> StackedLosses:
    return StackedLosses(settings, "binary", torch.zeros(0, dtype=F64), 1, rows or [])


def test_no_unintended_features_cost_nothing() -> None:
    W, b, _ = encoder(0)
    w = torch.randn(2, 12, dtype=F64, requires_grad=True)
    found = unintended_penalty(w, W, b)
    assert found.tolist() == [0.0, 0.0]
    assert torch.equal(torch.autograd.grad(found.sum(), w)[0], torch.zeros_like(w))
    losses = stacked(HeadSettings(method="selfreg", penalty=31.0))
    assert losses.regularizers([w[:1, None]], [w[:1, :1]]).tolist() == [0.0]


def test_each_run_has_its_own_penalty() -> None:
    W, b, b_dec = encoder()
    w, bias = torch.randn(8, 1, 12, dtype=F64), torch.randn(8, 1, dtype=F64)
    rows = [UnintendedRows([0], "affine", W, b - b_dec @ W), UnintendedRows([0], "decoder", 2 * W, None)]
    losses = stacked(
        HeadSettings(),
        HeadSettings(method="l2", l2=0.3),
        HeadSettings(method="l2", l2=0.3, legacy=True),
        HeadSettings(method="spectral_norm", spectral=0.4),
        HeadSettings(method="spectral_norm", spectral=0.4, legacy=True),
        HeadSettings(method="selfreg", penalty=3.0, penalty_reduction="sum"),
        HeadSettings(method="selfreg", penalty=5.0, alignment="decoder"),
        HeadSettings(method="selfreg", penalty=5.0, alignment="encoder"),
        rows=rows,
    )
    norms = w.flatten(1).norm(dim=-1)
    expected = torch.stack(
        [
            torch.zeros((), dtype=F64),
            0.3 * norms[1] ** 2,
            0.3 * (norms[2] + bias[2].abs()[0]),
            0.2 * norms[3] ** 2,
            0.4 * norms[4],
            3 * unintended_penalty(w[5], W, b - b_dec @ W, "sum")[0],
            5 * unintended_penalty(w[6], 2 * W)[0],
            torch.zeros((), dtype=F64),
        ]
    )
    torch.testing.assert_close(losses.regularizers([w], [bias]), expected)


def test_stacked_tasks_equal_each_alone() -> None:
    settings = [HeadSettings(method=m, legacy=old) for m in METHODS for old in (False, True)]
    z = torch.randn(len(settings), 9, 1, dtype=F64)
    y = (torch.rand(len(settings), 9) < 0.5).double()
    together = stacked(*settings).task(z, y)
    for i, one in enumerate(settings):
        torch.testing.assert_close(stacked(one).task(z[i : i + 1], y[i : i + 1])[0], together[i])


def test_pairs() -> None:
    r = torch.randn(2, 9, 2, dtype=F64)
    both = [HeadSettings(), HeadSettings(pair_loss="bradley_terry")]
    found = StackedLosses(both, "pairwise", r[0, 0], 1).task(r, None)
    pointwise = (F.softplus(-r[0, :, 0]) + F.softplus(r[0, :, 1])).mean() / 2
    torch.testing.assert_close(found, torch.stack([pointwise, -F.logsigmoid(r[1, :, 0] - r[1, :, 1]).mean()]))
    focal = StackedLosses([HeadSettings(method="focal", legacy=True)], "pairwise", r[0, 0], 1)
    at_zero = focal.task(torch.zeros(1, 1, 2, dtype=F64), None)
    assert float(at_zero) == pytest.approx((0.0347 + 0.1386) / 2, abs=5e-5)


@pytest.mark.parametrize(
    ("settings", "received"),
    [
        ({"method": "selfregs"}, "Did you mean 'selfreg'"),
        ({"select_by": "loss"}, "select_by='loss'"),
        ({"epochs": 0}, "epochs=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"class_weights": (0.0, 1.0)}, r"\(0.0, 1.0\)"),
        ({"legacy": True, "pair_loss": "bradley_terry"}, "'bradley_terry'"),
        ({"hidden_size": 0}, "hidden_size=0"),
    ],
)
def test_settings_refuse(settings: dict[str, Any], received: str) -> None:
    with pytest.raises(ValueError, match=received):
        HeadSettings(**settings)


def test_class_weights_must_fit_the_task() -> None:
    with pytest.raises(ValueError, match=r"2 numbers.*\(1.0, 2.0, 3.0\)"):
        stacked(HeadSettings(class_weights=(1.0, 2.0, 3.0)))
