"""The nearest-neighbour estimator against scikit-learn's, on the same columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif

from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.training.steering.mutual_information import code_mutual_information, mutual_information

LOW = [0.1032, 0.9417, 1.3571, 2.7183, 3.1416, 4.6692, 5.2203, 6.6067]
HIGH = [10.0271, 11.4142, 12.2361, 13.7321, 14.6458, 16.3166, 17.1219, 18.4391]


def by_sklearn(values: torch.Tensor, labels: torch.Tensor, seed: int = 0, k: int = 3) -> np.ndarray:
    return mutual_info_classif(values.numpy(), labels.numpy(), random_state=seed, n_neighbors=k)


def dense(n: int, m: int, n_labels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(n_labels, (n,), generator=generator)
    values = torch.randn(n, m, generator=generator, dtype=torch.float64)
    return values + torch.linspace(0, 2, m) * labels[:, None], labels


@pytest.mark.parametrize("transform", [lambda x: x, lambda x: 37 * x - 5])
@pytest.mark.parametrize("seed", [0, 1, 4])
@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.6837051837), (8.0, 0.0510166916), (9.7, 0.0)])
def test_toy(shift, expected, seed, transform):
    column = torch.tensor([LOW + [x - shift for x in HIGH]], dtype=torch.float64).T
    labels = torch.tensor([0] * 8 + [1] * 8)
    assert float(mutual_information(transform(column), labels, seed=seed)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("n_labels", [2, 5])
def test_equals_scikit_learn_on_dense_columns(n_labels, k):
    values, labels = dense(600, 9, n_labels)
    found = mutual_information(values, labels, n_neighbors=k)
    assert float(np.abs(found.numpy() - by_sklearn(values, labels, k=k)).max()) < 1e-9
    assert bool((found[:-1] <= found[1:] + 0.1).all())
    assert float(found[-1]) > 0.2


def test_a_label_of_one_row_is_left_out():
    values, labels = dense(200, 4)
    labels[17] = 9
    assert float(np.abs(mutual_information(values, labels).numpy() - by_sklearn(values, labels)).max()) < 1e-9


def test_a_small_class_takes_fewer_neighbours():
    values, labels = dense(200, 4)
    labels[:] = 0
    labels[:3] = 1
    assert float(np.abs(mutual_information(values, labels).numpy() - by_sklearn(values, labels)).max()) < 1e-9


def half_dead(n: int = 2000, m: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = (torch.arange(n) % 3 == 0).long()
    on = torch.rand(n, m, generator=generator) < torch.where(labels[:, None] == 1, 0.35, 0.10)
    return torch.where(on, torch.rand(n, m, generator=generator, dtype=torch.float64), 0.0), labels


def test_columns_of_zeros_agree_in_the_mean():
    values, labels = half_dead()
    ours, theirs = mutual_information(values, labels), torch.from_numpy(by_sklearn(values, labels))
    assert float((ours.mean() - theirs.mean()).abs()) < 3 * float(theirs.std()) * (2 / 40) ** 0.5
    assert float((mutual_information(values, labels, seed=1) - ours).abs().max()) > 0


def test_dead_columns_are_noise_or_nothing():
    labels = (torch.arange(3000) % 3 == 0).long()
    codes = SparseCodes.from_dense(torch.zeros(3000, 300))
    assert float(code_mutual_information(codes, labels).abs().max()) == 0
    noise = code_mutual_information(codes, labels, dead=True)
    assert 0.3 < float((noise == 0).double().mean()) < 0.7
    assert 0.001 < float(noise.mean()) < 0.01


def test_a_column_has_one_result_however_columns_are_put_together(monkeypatch):
    values, labels = half_dead(300, 20)
    values[:, 4] = 0
    codes = SparseCodes.from_dense(values)
    together = code_mutual_information(codes, labels, seed=3)
    for sizes in (1, 7):
        monkeypatch.setattr("sae_transformers.training.steering.mutual_information.COLUMNS_AT_ONCE", sizes)
        assert torch.equal(code_mutual_information(codes, labels, seed=3), together)
    alone = mutual_information(values[:, 7:8], labels, seed=3, numbers=torch.tensor([7]))
    assert float(alone) == float(together[7])
    assert float(together[4]) == 0


def test_bad_input():
    values, labels = dense(20, 2)
    with pytest.raises(ValueError, match=r"values \(20, 2\), labels \(19,\)"):
        mutual_information(values, labels[:-1])
    with pytest.raises(ValueError, match="n_neighbors=0"):
        mutual_information(values, labels, n_neighbors=0)
    with pytest.raises(ValueError, match="Received: 1 such"):
        mutual_information(values, torch.zeros_like(labels))
    values[3, 1] = float("nan")
    with pytest.raises(ValueError, match="Received: 1 that are not"):
        mutual_information(values, labels)
