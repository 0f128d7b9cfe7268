"""Functional features on toys worked out by hand, and against dense tensors."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from sae_transformers.latents.sparse_codes import SparseCodes
from sae_transformers.training.steering.functional_features import (
    FunctionalFeatures,
    functional_features,
    functional_steering,
    loss_weights,
    read_functional_features,
    save_functional_features,
    select_features,
    without_selection,
)
from sae_transformers.training.steering.mutual_information import mutual_information
from tests.tiny import tiny_sae


def toy(expectation=(1.0, -1.0, 0.0, 2.0, -3.0), scores=(0.5, 0.1, 0.3, 0.06, 0.04)) -> FunctionalFeatures:
    e = torch.tensor(expectation)
    return FunctionalFeatures(
        torch.tensor(scores, dtype=torch.float64), e, e.clamp(min=0) + 0.1, (-e).clamp(min=0) + 0.1
    )


def lists(found) -> tuple[list[int], list[int]]:
    return found[0].tolist(), found[1].tolist()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"proportion": 0.7}, ([0], [1])),
        ({"proportion": 0.85}, ([0, 3], [1])),
        ({"count": 1}, ([0], [])),
        ({"count": 9}, ([0, 3], [1, 4])),
    ],
)
def test_selection_by_hand(choice, expected):
    assert lists(select_features(toy(), **choice)) == expected


def test_dead_latents_count_only_in_legacy():
    """Noise on latents that are never active takes most of the sum, and the selection needs more latents for it."""
    dead = torch.zeros(95)
    scores = torch.cat([torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1]), torch.full((95,), 0.1)]).double()
    expectation = torch.cat([torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), dead])
    features = FunctionalFeatures(scores, expectation, expectation.clamp(min=0), (-expectation).clamp(min=0))
    assert lists(select_features(features, proportion=0.1, legacy=True)) == ([0, 2], [1])  # of 11, more than 1.1
    assert lists(select_features(features, proportion=0.1)) == ([0], [])  # of 1.5, more than 0.15


def test_equals_dense_statistics():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 6, generator=generator, dtype=torch.float64) for n in (40, 30))
    a[:, 1] = b[:, 1] = 0
    a[:, 2] += 1
    codes = [SparseCodes.from_dense(one) for one in (a, b)]
    weights = torch.rand(40, generator=generator)
    found = functional_features(*codes, weights_a=weights)
    torch.testing.assert_close(found.expectation, a.mean(0) - b.mean(0))
    torch.testing.assert_close(found.values_a, (weights.double() / weights.double().sum()) @ a)
    torch.testing.assert_close(found.values_b, b.mean(0))
    labels = torch.tensor([1] * 40 + [0] * 30)
    expected = mutual_information(torch.cat([a, b]), labels)
    expected[1] = 0  # dead
    torch.testing.assert_close(found.mutual_information, expected)
    assert found.live.tolist() == [True, False, True, True, True, True]
    assert int(select_features(found, count=1)[0]) == 2
    plain = functional_features(*codes)  # identity: the functional values' difference is the expectation
    torch.testing.assert_close(plain.values_a - plain.values_b, plain.expectation)


def test_loss_weights():
    weights = loss_weights(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))
    assert weights.tolist() == pytest.approx([0.75 / 1.25, 0.5 / 1.25])


@pytest.mark.parametrize("towards", [0, 1])
def test_steering(towards):
    features = toy()
    a, b = select_features(features, count=9)
    steering = functional_steering([(2, features, a, b)], towards=towards, degree=3.0)
    found = {edit.feature: (edit.sae, edit.op, edit.value) for edit in steering.feature_edits}
    wanted, other = ((a, features.values_a), (b, features.values_b))[:: 1 if towards == 0 else -1]
    assert steering.positions == "last_prompt"
    for i in wanted[0].tolist():
        assert found[i] == (2, "at_least", pytest.approx(3 * float(wanted[1][i])))
    for i in other[0].tolist():
        assert found[i] == (2, "shrink", pytest.approx(3 * float(other[1][i])))
    assert len(found) == 4


def test_saved_and_read(tmp_path):
    save_file(save_functional_features(toy()), tmp_path / "features.safetensors")
    for ours, theirs in zip(toy(), read_functional_features(tmp_path / "features.safetensors"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "topk-tanh"])
def test_without_selection_is_relu(activation):
    sae = tiny_sae(activation=activation, layer=1, apply_b_dec_to_input=True)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    opened = without_selection(sae)
    torch.testing.assert_close(opened.encode(hidden), sae.encode_pre_acts(hidden).relu())
    assert opened.W_dec.data_ptr() == sae.W_dec.data_ptr()
    assert opened.config.read_at == sae.config.read_at


def test_nothing_to_open():
    sae = tiny_sae(activation="jumprelu", layer=1)
    assert without_selection(sae) is sae


BAD = {
    "both": (lambda: select_features(toy(), proportion=0.1, count=2), "proportion=0.1, count=2"),
    "neither": (lambda: select_features(toy()), "proportion=None, count=None"),
    "proportion": (lambda: select_features(toy(), proportion=1.5), "proportion=1.5"),
    "count": (lambda: select_features(toy(), count=0), "count=0"),
    "nan": (lambda: select_features(toy(scores=(0.5, math.nan, 0, 0, 0)), count=1), "Received: 1 latents"),
    "none left": (lambda: select_features(toy(expectation=(0.0,) * 5), count=1), "No latent tells"),
    "nothing known": (lambda: select_features(toy(scores=(0.0,) * 5), proportion=0.5), "No latent tells"),
    "towards": (lambda: functional_steering([], towards=2), "towards=2"),
    "degree": (lambda: functional_steering([], towards=1, degree=-1.0), "degree=-1.0"),
    "no edit": (lambda: functional_steering([], towards=1), "no latent to edit"),
    "losses": (lambda: loss_weights(torch.ones(2), torch.ones(3)), r"\(2,\) and \(3,\)"),
    "empty group": (
        lambda: functional_features(
            SparseCodes.from_dense(torch.ones(5, 3)), SparseCodes.from_dense(torch.ones(0, 3))
        ),
        "Received: 0 of group b",
    ),
    "two SAEs": (
        lambda: functional_features(
            SparseCodes.from_dense(torch.ones(5, 3)), SparseCodes.from_dense(torch.ones(5, 4))
        ),
        "d_sae 3 and 4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_folder_without_the_files(tmp_path):
    with pytest.raises(ValueError, match=r"Received: \[\]"):
        read_functional_features(tmp_path)
    save_file({"expectation": torch.ones(3)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="half.safetensors"):
        read_functional_features(tmp_path / "half.safetensors")
