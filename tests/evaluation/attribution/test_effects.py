"""Effects of features: a planted model's are recovered exactly by every method, and the methods' own equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.attribution.effects import (
    ScaledLatents,
    ablation_effects,
    gradient_effects,
    integrated_gradients,
)
from sae_transformers.evaluation.attribution.faithfulness import (
    Agreement,
    agreement,
    curve_points,
    faithfulness_curve,
    pooled_curves,
    rank_correlation,
)
from sae_transformers.evaluation.attribution.targets import Target
from tests.evaluation.attribution.worlds import (
    DOUBLE,
    FIRST,
    IDS,
    PLANTED,
    SECOND,
    planted_effects,
    planted_model,
    random_model,
)

SIZES: dict[str, Any] = {"tokens_per_batch": 40}  # five rows of eight tokens: several batches


def difference(out):
    return out.logits[:, -1, FIRST] - out.logits[:, -1, SECOND]


AIM = Target("difference", IDS, difference, {})


def dense(pairs, effect, d_sae: int, sae: int = 0) -> torch.Tensor:
    """Effects as (tokens, d_sae)."""
    found = torch.zeros(len(IDS), d_sae, dtype=DOUBLE)
    own = pairs.sae == sae
    found[pairs.position[own], pairs.feature[own]] = effect[own]
    return found


@pytest.fixture(scope="module")
def planted():
    model = planted_model()
    expected = planted_effects(model)
    expected[0] = 0  # the first token is left out
    return model, expected


def test_planted_features_are_recovered_exactly_by_every_method(planted):
    model, expected = planted
    found = gradient_effects(model, AIM, [0])
    scaled = ScaledLatents(model, AIM, found.pairs, skip_first=1)
    by_method = {
        "gradient": found.effect,
        "integrated": integrated_gradients(scaled, steps=3, **SIZES),
        "ablation": ablation_effects(scaled, torch.arange(len(found.effect)), **SIZES),
    }
    assert expected.abs().max() > 0.1
    for effect in by_method.values():
        torch.testing.assert_close(dense(found.pairs, effect, 64), expected, rtol=1e-10, atol=1e-12)
        strong = found.pairs.feature[effect.abs() > 1e-9]
        assert set(strong.tolist()) == set(PLANTED)  # and no other feature


def test_the_planted_pairs_are_all_that_the_curve_needs(planted):
    model, expected = planted
    found = gradient_effects(model, AIM, [0])
    scaled = ScaledLatents(model, AIM, found.pairs, skip_first=1)
    curve = faithfulness_curve(scaled, found.effect, draws=2, seed=0, **SIZES)
    total = float(expected.sum())
    assert curve.whole == pytest.approx(found.value)
    assert curve.whole - curve.none == pytest.approx(total)
    effects = found.effect[found.effect.abs().argsort(descending=True)]
    for n, kept, removed in zip(curve.n, curve.shares("keep"), curve.shares("remove"), strict=True):
        share = float(effects[:n].sum()) / total
        assert (kept, removed) == (pytest.approx(share, abs=1e-9), pytest.approx(1 - share, abs=1e-9))
    planted_pairs = int((found.effect.abs() > 1e-9).sum())
    enough = next(n for n in curve.n if n >= planted_pairs)
    assert curve.shares("keep")[curve.n.index(enough)] == pytest.approx(1)
    assert abs(curve.shares("keep_random")[curve.n.index(enough)] - 1) > 0.05
    assert curve.shares("keep_random")[-1] == pytest.approx(1)


# -- on a random base ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["residual", "transcoder"])
def world(request):
    model = random_model(request.param)
    found = gradient_effects(model, AIM, [0, 1])
    return model, found, ScaledLatents(model, AIM, found.pairs, skip_first=1)


def test_every_active_latent_after_the_first_token_is_a_pair(world):
    model, found, _ = world
    with torch.no_grad():
        out = model(torch.tensor([IDS]), output_features=True)
    for number, features in enumerate(out.sae_features):
        latents = features.to_dense()[0]
        latents[0] = 0
        torch.testing.assert_close(dense(found.pairs, found.pairs.activation, 64, number), latents)
    assert found.value == pytest.approx(float(difference(out)))
    assert not (found.pairs.position == 0).any()


def test_ablations_are_those_of_steering(world):
    """Each pair by a `FeatureEdit` at its token."""
    model, found, scaled = world
    which = torch.cat([(found.pairs.sae == n).nonzero()[:4, 0] for n in (0, 1)])
    effects = ablation_effects(scaled, which, **SIZES)
    for place, effect in zip(which.tolist(), effects.tolist(), strict=True):
        sae, feature, position = (int(one[place]) for one in found.pairs[:3])
        mask = torch.zeros(1, len(IDS), dtype=torch.bool)
        mask[0, position] = True
        edit = FeatureEdit(feature=feature, op="scale", value=0.0, sae=sae)
        with torch.no_grad():
            changed = difference(model(torch.tensor([IDS]), steering=Steering([edit]), steering_mask=mask))
        assert effect == pytest.approx(found.value - float(changed), rel=1e-9, abs=1e-11)


def test_gradients_are_the_slopes_of_scaled_latents(world):
    _, found, scaled = world
    which = torch.cat([(found.pairs.sae == n).nonzero()[:3, 0] for n in (0, 1)])
    factors = torch.ones(2 * len(which), len(found.effect), dtype=DOUBLE)
    for row, place in enumerate(which.tolist()):
        factors[2 * row, place], factors[2 * row + 1, place] = 1 + 1e-5, 1 - 1e-5
    with torch.no_grad():
        scores = scaled.scores(factors)
    slopes = (scores[::2] - scores[1::2]) / 2e-5
    torch.testing.assert_close(found.effect[which], slopes, rtol=1e-5, atol=1e-8)


def test_integrated_gradients_add_up_to_what_the_latents_do(world):
    """Completeness, for each SAE by itself: the target less its value without the SAE's latents."""
    model, found, scaled = world
    effects = integrated_gradients(scaled, steps=300, tokens_per_batch=400)
    for number in (0, 1):
        own = found.pairs.sae == number
        factors = torch.ones(1, len(own), dtype=DOUBLE)
        factors[:, own] = 0
        with torch.no_grad():
            without = float(scaled.scores(factors, saes=[number]))
        assert float(effects[own].sum()) == pytest.approx(found.value - without, rel=2e-3)
    one_step = integrated_gradients(scaled, steps=1, **SIZES)
    assert (one_step - effects).abs().max() > 1e-4  # the base is not linear


def test_one_saes_effects_do_not_depend_on_the_others_being_asked_for(world):
    model, found, _ = world
    for number in (0, 1):
        alone = gradient_effects(model, AIM, [number])
        torch.testing.assert_close(
            dense(alone.pairs, alone.effect, 64, number), dense(found.pairs, found.effect, 64, number),
            rtol=1e-9, atol=1e-12,
        )  # fmt: skip


def test_leading_tokens_are_left_as_they_are(world):
    """Without any pair kept, the first tokens' latents stay: cut by hand."""
    model, found, scaled = world
    with torch.no_grad():
        none = float(scaled.scores(torch.zeros(1, len(found.effect), dtype=DOUBLE), others=0.0))

        def cut(features):
            values = features.values.clone()
            values[:, 1:] = 0
            return values

        by_hand = float(difference(model(torch.tensor([IDS]), edit_features={0: cut, 1: cut})))
    assert none == pytest.approx(by_hand)
    assert none != pytest.approx(found.value)


def test_batches_change_nothing(world):
    _, found, scaled = world
    which = torch.arange(6)
    one = ablation_effects(scaled, which, tokens_per_batch=8)
    torch.testing.assert_close(one, ablation_effects(scaled, which, tokens_per_batch=4096), rtol=1e-9, atol=1e-12)


def test_a_target_without_a_gradient_is_refused(world):
    model, _, _ = world
    cases: list[tuple[Any, str]] = [
        (lambda out: difference(out).detach(), "without a gradient"),
        (lambda out: out.logits[:, -1], r"shape \(1,\)"),
        (lambda out: 3.0, "Received: float"),
    ]
    for function, message in cases:
        with pytest.raises(ValueError, match=message):
            gradient_effects(model, Target("f", IDS, function, {}), [0])


# -- agreement -------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 9, (40,), generator=generator).double()
    b = a + torch.randn(40, generator=generator).double() * 3
    assert rank_correlation(a, b) == pytest.approx(float(stats.spearmanr(a, b).statistic), abs=1e-12)
    found = agreement(a - 4, b - 4, "ablation")
    same = float(((a - 4).sign() == (b - 4).sign()).double().mean())
    assert found == Agreement("ablation", 40, rank_correlation(a, b), found.pearson, same)
    assert found.pearson == pytest.approx(float(stats.pearsonr(a, b).statistic))
    assert rank_correlation(a, torch.ones(40)) != rank_correlation(a, torch.ones(40))  # NaN


@pytest.mark.parametrize(("n", "points"), [(0, [0]), (1, [0, 1]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 4, 5])])
def test_a_curves_points_double(n, points):
    assert curve_points(n) == points


def test_pooled_curves_are_shares_of_sums(planted):
    model, _ = planted
    found = gradient_effects(model, AIM, [0])
    curves = []
    for count in (9, 3):
        some = ScaledLatents(model, AIM, found.pairs.take(torch.arange(count)), skip_first=1)
        curves.append(faithfulness_curve(some, found.effect[:count], draws=1, seed=0, **SIZES))
    rows = pooled_curves(curves)
    assert [row["n"] for row in rows] == [0, 1, 2]  # of which both curves have no last point
    long, short = curves
    total = long.keep[2] - long.none + short.keep[2] - short.none
    assert rows[2]["keep"] == pytest.approx(total / (long.whole - long.none + short.whole - short.none))
    assert rows[0]["keep"] == pytest.approx(0) and rows[0]["remove"] == pytest.approx(1)
    assert pooled_curves([]) == []
