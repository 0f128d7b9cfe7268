import math
from typing import Any

import pytest
import torch

from sae_transformers.evaluation.fairness import counterfactuals as reliance
from sae_transformers.evaluation.fairness.counterfactuals import (
    attributed_reliance,
    feature_reliance,
    group_gaps,
    swap_sensitivity,
    unintended_reconstruction,
)
from tests.tiny import WIDTH, tiny_sae

F64 = torch.float64
U = torch.tensor([2, 5, 30])


def test_reconstruction_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, states = tiny_sae(dtype=F64), torch.randn(9, 2, WIDTH, dtype=F64)
    pre = sae.encode_pre_acts(states)[..., U].relu()
    expected = (pre @ sae.W_dec[U]).detach()
    monkeypatch.setattr(reliance, "AT_ONCE", 3 * 4)
    torch.testing.assert_close(unintended_reconstruction(states, sae, U), expected)
    mask = torch.zeros(64, dtype=torch.bool).index_fill(0, U, True)
    torch.testing.assert_close(unintended_reconstruction(states, sae, mask), expected)
    torch.testing.assert_close(unintended_reconstruction(states, sae, torch.cat([U, U])), expected)
    assert unintended_reconstruction(states.half(), tiny_sae(), U).dtype == torch.float16


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm", "scalar"])
def test_reconstruction_is_in_the_units_of_the_state(normalization: str) -> None:
    """All features together say the SAE's own reconstruction, less what `b_dec` and the mean say."""
    settings: dict[str, Any] = {"input_scale": 3.0} if normalization == "scalar" else {}
    sae = tiny_sae(dtype=F64, activation="relu", normalization=normalization, **settings)
    states = torch.randn(4, WIDTH, dtype=F64) * 5 + 1
    zero = sae.decode(torch.zeros(4, 64, dtype=F64), states)
    expected = (sae(states).reconstruction - zero).detach()
    torch.testing.assert_close(unintended_reconstruction(states, sae, torch.arange(64)), expected)


@pytest.mark.parametrize(
    ("features", "received"),
    [
        (torch.tensor([64]), "64 to 64"),
        (torch.tensor([-1]), "-1 to -1"),
        (torch.tensor([0.5]), "float32"),
        (torch.zeros(3, dtype=torch.bool), r"\(3,\)"),
    ],
)
def test_bad_features_are_refused(features: torch.Tensor, received: str) -> None:
    with pytest.raises(ValueError, match=received):
        unintended_reconstruction(torch.zeros(1, WIDTH), tiny_sae(), features)


def test_an_encoder_that_is_not_affine_and_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="'gated'"):
        unintended_reconstruction(torch.zeros(1, WIDTH), tiny_sae(activation="gated"), U)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        unintended_reconstruction(torch.zeros(1, 3), tiny_sae(), U)


def test_swap_sensitivity_of_known_changes() -> None:
    first, second = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([1.0, 1.0, 1.0, -0.5])
    found = swap_sensitivity(first, second)
    assert found["delta_logit"]["value"] == pytest.approx(1.0)
    assert found["flips"]["value"] == 0.5
    expected = (first.sigmoid() - second.sigmoid()).abs().mean()
    assert found["delta_probability"]["value"] == pytest.approx(float(expected), abs=1e-6)
    assert all(row["low"] <= row["value"] <= row["high"] for row in found.values())
    assert swap_sensitivity(first[:, None], second[:, None]) == found
    same = swap_sensitivity(first, first)
    assert all(row == {"value": 0.0, "low": 0.0, "high": 0.0} for row in same.values())
    several = swap_sensitivity(torch.eye(3), torch.eye(3).roll(1, 0))
    assert several["flips"]["value"] == 1.0 and several["delta_logit"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        swap_sensitivity(first, first[:3])


def test_group_gaps_by_hand() -> None:
    predictions = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0])
    labels = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = group_gaps(predictions, labels, groups)
    assert found["demographic_parity"] == 0.25
    assert found["equal_opportunity"] == pytest.approx(2 / 3 - 1 / 2)
    assert found["equalised_odds"] == found["equal_opportunity"]
    assert math.isnan(group_gaps(predictions[2:6], labels[2:6], torch.tensor([0, 0, 1, 1]))["equalised_odds"])
    with pytest.raises(ValueError, match=r"groups=\[0\]"):
        group_gaps(predictions, labels, groups * 0)
    with pytest.raises(ValueError, match=r"`predictions`.*2"):
        group_gaps(predictions * 2, labels, groups)


def test_reliance_of_planted_weights() -> None:
    """The SAE's encoder and decoder are the identity, so a feature is a coordinate and states are not negative."""
    sae = tiny_sae(dtype=F64, activation="relu", d_sae=WIDTH, apply_b_dec_to_input=False)
    with torch.no_grad():
        for name, value in (("W_enc", torch.eye(WIDTH)), ("W_dec", torch.eye(WIDTH)), ("b_enc", torch.zeros(WIDTH))):
            getattr(sae, name).copy_(value)
    states, weight = torch.rand(500, WIDTH, dtype=F64), torch.zeros(WIDTH, dtype=F64)
    weight[2] = 2.0
    assert feature_reliance(weight, states, sae, U) == {
        "variance": pytest.approx(1.0),
        "contribution": pytest.approx(1.0),
    }
    none = feature_reliance(weight, states, sae, torch.tensor([7]))
    assert none == {"variance": pytest.approx(0.0), "contribution": pytest.approx(0.0)}
    weight[7] = 1.0
    s = states @ weight
    part = 2 * states[:, 2]
    covariance = torch.cov(torch.stack([part, s]))
    found = feature_reliance(weight[None], states, sae, U)
    assert found["variance"] == pytest.approx(float(covariance[0, 1] / covariance[1, 1]))
    spread = [float((x - x.mean()).abs().mean()) for x in (part, s - part)]
    assert found["contribution"] == pytest.approx(spread[0] / sum(spread))
    both = torch.stack([weight + 5, torch.full_like(weight, 5)])  # a term of all classes: softmax does not see it
    assert feature_reliance(both, states, sae, U)["variance"] == pytest.approx(found["variance"])
    assert feature_reliance(both, states, sae, U, one_of=False)["variance"] != pytest.approx(found["variance"])
    assert feature_reliance(weight * 0, states, sae, U) == {"variance": 0.0, "contribution": 0.0}
    with pytest.raises(ValueError, match=r"states \(1, 32\)"):
        feature_reliance(weight, states[:1], sae, U)


def test_reliance_by_attribution_is_that_of_weights_where_the_score_is_linear() -> None:
    sae = tiny_sae(dtype=F64, activation="relu")
    states = torch.randn(60, WIDTH, dtype=F64)
    weights, features = torch.randn(3, WIDTH, dtype=F64), torch.tensor([3, 17, 40])
    for rows in (weights, weights[:1]):
        for one_of in (True, False):
            expected = feature_reliance(rows, states, sae, features, one_of=one_of)
            found = attributed_reliance(lambda x, rows=rows: x @ rows.T, states, sae, features, one_of=one_of)
            assert found == pytest.approx(expected, rel=1e-9)
            assert 0 < expected["contribution"] < 1
    assert attributed_reliance(lambda x: x @ weights[0], states, sae, features) == pytest.approx(
        feature_reliance(weights[0], states, sae, features), rel=1e-9
    )


def test_reliance_of_a_head_that_is_not_linear() -> None:
    """Coordinates are features: a hidden layer that reads planted ones alone relies on them alone."""
    sae = tiny_sae(dtype=F64, activation="relu", d_sae=WIDTH, apply_b_dec_to_input=False)
    with torch.no_grad():
        for name, value in (("W_enc", torch.eye(WIDTH)), ("W_dec", torch.eye(WIDTH)), ("b_enc", torch.zeros(WIDTH))):
            getattr(sae, name).copy_(value)
    states = torch.rand(200, WIDTH, dtype=F64)
    hidden = torch.zeros(4, WIDTH, dtype=F64)
    hidden[:, 2] = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=F64)

    def score(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ hidden.T - 0.3) @ torch.tensor([1.0, 2.0, -0.5, 1.5], dtype=F64)

    assert attributed_reliance(score, states, sae, torch.tensor([7])) == {"variance": 0.0, "contribution": 0.0}
    mine = attributed_reliance(score, states, sae, torch.tensor([2]))["contribution"]
    hidden[:, 7] = 3.0
    shared = attributed_reliance(score, states, sae, torch.tensor([2]))["contribution"]
    assert mine > 0.5 > shared > 0
    with pytest.raises(ValueError, match=r"Expected a score"):
        attributed_reliance(lambda x: x.sum(), states, sae, torch.tensor([2]))
