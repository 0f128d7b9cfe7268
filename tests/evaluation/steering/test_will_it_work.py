"""Signs are hand counts, probabilities are calibrated on other concepts, and what is not known is not said."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy
import pytest
import torch

from sae_transformers import FeatureEdit, FluencyBudget, Steering, will_it_work
from sae_transformers.evaluation.steering.early_signs import difference_agreement, early_signs
from sae_transformers.evaluation.steering.kl_divergence import kl_divergence
from sae_transformers.evaluation.steering.will_it_work import (
    OUTCOMES,
    SteeringForecaster,
    macro_f1,
    on_unseen_concepts,
    steering_outcome,
)
from tests.create_training_data.words import word_texts

PROMPTS = word_texts(4, seed=1)
NOISE = 0.3


def push(value: float) -> Steering:
    return Steering([FeatureEdit(feature=3, op="direction", value=value, unit="norm")])


def data(n: int = 300, concepts: int = 6, seed: int = 0) -> tuple[list[dict[str, float]], list[str], list[str]]:
    """Outcomes that depend on a dose, with noise; the second sign says nothing."""
    source = numpy.random.default_rng(seed)
    doses = source.uniform(-1, 1, n)
    noisy = doses + NOISE * source.standard_normal(n)
    outcomes = [OUTCOMES[int(value > -0.35) + int(value > 0.35)] for value in noisy]
    signs = [
        {"log_dose": float(a), "nothing": float(b)} for a, b in zip(doses, source.standard_normal(n), strict=True)
    ]
    return signs, outcomes, [str(i % concepts) for i in range(n)]


@torch.no_grad()
def test_signs_are_those_of_forward_passes_by_hand(model: Any, tokenizer: Any) -> None:
    steering = push(0.5)
    found = early_signs(model, tokenizer, PROMPTS, steering)
    kls, entropies, others, cosines, firsts, losses, distinct = [], [], [], [], [], [], []
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        n = ids.shape[1]
        plain, moved = (model.generate(ids, max_new_tokens=6, do_sample=False, steering=s) for s in (False, steering))
        a, b = (model(plain, steering=s, output_hidden_states=True) for s in (False, steering))
        log_p, log_q = (one.logits[0, n - 1 : -1].log_softmax(-1) for one in (a, b))
        kls.append(kl_divergence(log_p, log_q))
        entropies.append(-(log_q.exp() * log_q).sum(-1) + (log_p.exp() * log_p).sum(-1))
        others.append((log_p.argmax(-1) != log_q.argmax(-1)).float())
        cosines.append(torch.cosine_similarity(*(one.hidden_states[-1][0, n - 1] for one in (a, b)), dim=0))
        new, own = moved[0, n:].tolist(), plain[0, n:].tolist()
        same = [x == y for x, y in zip(new, own, strict=False)]
        firsts.append((same.index(False) if False in same else len(own)) / len(own))
        log_new = model(moved, steering=False).logits[0, n - 1 : -1].log_softmax(-1)
        losses.append(float(log_p.gather(1, plain[0, n:, None]).mean() - log_new.gather(1, moved[0, n:, None]).mean()))
        distinct.append(len(set(new)) / len(new) - len(set(own)) / len(own))
    assert found["log_dose"] == pytest.approx(math.log(0.5), abs=1e-4)
    assert found["log_kl"] == pytest.approx(float(torch.cat(kls).mean().log()), abs=1e-3)
    assert found["entropy_change"] == pytest.approx(float(torch.cat(entropies).mean()), abs=1e-4)
    assert found["other_token"] == pytest.approx(float(torch.cat(others).mean())) != 0
    assert found["state_cosine"] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    assert found["first_divergent"] == pytest.approx(sum(firsts) / 4)
    assert found["loss_change"] == pytest.approx(sum(losses) / 4, abs=1e-4)
    assert found["distinct_change"] == pytest.approx(sum(distinct) / 4)


def test_what_does_nothing_has_the_least_signs(model: Any, tokenizer: Any) -> None:
    found = early_signs(model, tokenizer, PROMPTS, push(1e-9))
    assert found["first_divergent"] == 1.0 and found["other_token"] == 0.0
    assert found["loss_change"] == pytest.approx(0, abs=1e-6) and found["state_cosine"] == pytest.approx(1, abs=1e-6)


def test_differences_that_agree_and_that_do_not() -> None:
    source, labels = torch.Generator().manual_seed(0), torch.tensor([1] * 40 + [0] * 40)
    noise = torch.randn(80, 16, generator=source)
    apart = noise + 5.0 * labels[:, None] * torch.eye(16)[0]
    agreeing, mixed = difference_agreement(apart, labels), difference_agreement(noise, labels)
    assert agreeing["agreement"] > 0.7 > 0.4 > mixed["agreement"]
    direction = apart[:40].mean(0) - apart[40:].mean(0)
    along = apart @ (direction / direction.norm())
    spread = torch.cat([part - part.mean() for part in (along[:40], along[40:])]).square().mean().sqrt()
    assert agreeing["separation"] == pytest.approx(float(direction.norm() / spread), rel=1e-4)
    with pytest.raises(ValueError, match="both must occur"):
        difference_agreement(noise, torch.ones(80))


def test_probabilities_are_calibrated_and_sets_hold_the_truth_on_unseen_concepts() -> None:
    signs, outcomes, concepts = data(1200)
    found = on_unseen_concepts(signs, outcomes, concepts)
    assert found.macro_f1 > 0.65 > 0.3 > found.majority_macro_f1 and found.accuracy > found.majority_accuracy + 0.2
    assert found.coverage == pytest.approx(0.9, abs=0.03)
    assert 0 < found.abstained < 1 and found.accuracy_answered is not None
    assert found.accuracy_answered > found.accuracy + 0.05
    sure = [one.over for one in found.forecasts]
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        rows = [i for i, value in enumerate(sure) if low <= value < high]
        said, true = sum(sure[i] for i in rows) / len(rows), sum(outcomes[i] == "over" for i in rows) / len(rows)
        assert said == pytest.approx(true, abs=0.09)


def test_it_abstains_where_signs_say_nothing() -> None:
    signs, outcomes, concepts = data(300)
    empty = [{"nothing": row["nothing"]} for row in signs]
    found = on_unseen_concepts(empty, outcomes, concepts)
    assert found.abstained > 0.8 and found.coverage > 0.8 and found.log_loss == pytest.approx(math.log(3), abs=0.05)


def test_it_goes_through_json(model: Any, tokenizer: Any) -> None:
    signs = [early_signs(model, tokenizer, PROMPTS, push(value)) for value in (0.01, 0.02, 0.3, 0.4, 1.5, 2.0)]
    outcomes, concepts = ["under", "under", "success", "success", "over", "over"], list("ababab")
    forecaster = SteeringForecaster.fit(signs, outcomes, concepts)
    again = SteeringForecaster.from_dict(json.loads(json.dumps(forecaster.to_dict())))
    assert again == forecaster and forecaster.steerings == 6 and forecaster.concepts == 2
    one = will_it_work(model, tokenizer, push(2.0), PROMPTS, again)
    assert one == forecaster.forecast(signs[-1]) and one.under + one.success + one.over == pytest.approx(1)
    assert max(OUTCOMES, key=lambda name: getattr(one, name)) == "over"
    assert max(OUTCOMES, key=lambda name: getattr(forecaster.forecast(signs[0]), name)) == "under"
    assert one.possible == OUTCOMES and one.outcome is None  # of six nothing is ruled out at 90 %
    with pytest.raises(ValueError, match="Received: format='other'"):
        SteeringForecaster.from_dict({**forecaster.to_dict(), "format": "other"})


def test_an_outcome_that_was_never_seen_is_never_likely() -> None:
    signs, outcomes, concepts = data(120)
    kept = [i for i, one in enumerate(outcomes) if one != "success"]
    two = [[column[i] for i in kept] for column in (signs, outcomes, concepts)]
    found = SteeringForecaster.fit(two[0], two[1], two[2]).forecast({"log_dose": 0.0, "nothing": 0.0})  # pyright: ignore
    assert found.success < 0.05 and found.under > 0.1 and found.over > 0.1


@pytest.mark.parametrize(
    ("effect", "ratio", "repetition", "expected"),
    [(0.3, 1.2, 0.0, "success"), (0.1, 1.2, 0.0, "under"), (0.3, 1.7, 0.0, "over"), (0.0, 1.2, 0.5, "over")],
)
def test_outcomes(effect: float, ratio: float, repetition: float, expected: str) -> None:
    budget = FluencyBudget(1.6, 0.2)
    assert steering_outcome(effect, ratio, repetition, least_effect=0.2, budget=budget) == expected


def test_macro_f1_is_a_mean_over_the_outcomes_that_occur() -> None:
    true = ["under", "under", "over", "success"]
    assert macro_f1(true, true) == 1.0
    assert macro_f1(["under"] * 4, true) == pytest.approx((2 * 2 / (4 + 2) + 0 + 0) / 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s, o, c: (s[:-1], o, c), "Received: 29 signs, 30 outcomes"),
        (lambda s, o, c: (s, ["maybe", *o[1:]], c), r"Received: \['maybe'\]"),
        (lambda s, o, c: ([{"other": 1.0}, *s[1:]], o, c), "in one"),
        (lambda s, o, c: ([{**s[0], "nothing": math.nan}, *s[1:]], o, c), "Received: 1 that are not"),
        (lambda s, o, c: (s, ["over"] * 30, c), "two outcomes and two concepts"),
        (lambda s, o, c: (s, o, ["a"] * 30), "of 1 concepts"),
        (lambda s, o, c: ([], [], []), "Received: 0 signs"),
    ],
)
def test_bad_data(change: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SteeringForecaster.fit(*change(*data(30)))


@pytest.mark.parametrize("signs", [{"log_dose": 0.0}, {"log_dose": 0.0, "nothing": math.inf}])
def test_bad_signs(signs: dict[str, float]) -> None:
    forecaster = SteeringForecaster.fit(*data(60))
    with pytest.raises(ValueError, match="Expected finite numbers of the names"):
        forecaster.forecast(signs)
    with pytest.raises(ValueError, match="level=1"):
        SteeringForecaster.fit(*data(60), level=1)


@pytest.mark.parametrize(("steering", "prompts"), [(Steering(), PROMPTS), (push(1.0), []), (push(1.0), "text")])
def test_nothing_to_look_at(model: Any, tokenizer: Any, steering: Steering, prompts: Any) -> None:
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts"):
        early_signs(model, tokenizer, prompts, steering)
