"""KL to the unsteered model equals a dense reference, at the positions where generation would steer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sae_transformers import FeatureEdit, Steering
from sae_transformers.evaluation.steering import kl_divergence as token_divergence
from sae_transformers.evaluation.steering.kl_divergence import Reading, divergence_from_unsteered, kl_divergence

PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11], [6]]
AFTER = [[20, 21], [22], [23, 24, 25]]


def steering(positions: Any = "all") -> Steering:
    return Steering([FeatureEdit(feature=3, op="direction", value=1.0, unit="norm")], positions=positions)


def dense(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q.double(), log_p.double(), log_target=True, reduction="none").sum(-1)


def test_kl_is_that_of_torch_and_of_a_closed_form() -> None:
    log_p, log_q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(
        -1
    )
    torch.testing.assert_close(kl_divergence(log_p, log_q), dense(log_p, log_q))
    torch.testing.assert_close(
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=log_p), torch.distributions.Categorical(logits=log_q)
        ),
        kl_divergence(log_p, log_q),
    )
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    quarter = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    assert float(kl_divergence(half, quarter)) == pytest.approx(0.5 * torch.tensor(2.0).log().item())


def test_everywhere_is_a_plain_pass(model: Any) -> None:
    (found,) = divergence_from_unsteered(model, PROMPTS, AFTER, [Reading(steering())])
    assert found.prompt is not None
    for place, (before, after) in enumerate(zip(PROMPTS, AFTER, strict=True)):
        ids = torch.tensor([[*before, *after]])
        with torch.no_grad():
            log_p = model.lm(ids).logits[0, :-1].log_softmax(-1)
            log_q = model(ids, steering=steering()).logits[0, :-1].log_softmax(-1)
        expected = dense(log_p, log_q)
        count = len(before) - 1
        torch.testing.assert_close(found.prompt[place], expected[:count], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.continuation[place], expected[count:], rtol=1e-4, atol=1e-6)
        assert bool((expected > 1e-3).all())


def forced(model: Any, before: list[int], after: list[int], way: Any) -> torch.Tensor:
    """Log-probabilities of every step of a generation that is made to write these tokens."""
    seen: list[torch.Tensor] = []

    def force(ids: Any, scores: Any) -> Any:
        seen.append(scores.log_softmax(-1))
        return F.one_hot(torch.tensor([after[len(seen) - 1]]), scores.shape[1]).float()

    model.generate(
        torch.tensor([before]), attention_mask=torch.ones(1, len(before)).long(), steering=way, pad_token_id=0,
        max_new_tokens=len(after), do_sample=False, logits_processor=[force],
    )  # fmt: skip
    return torch.cat(seen)


@pytest.mark.parametrize("positions", ["generated", "prompt", "last_prompt", [(1, None)], [(-2, -1)]])
def test_steering_acts_where_generation_steers(model: Any, positions: Any) -> None:
    (found,) = divergence_from_unsteered(model, PROMPTS, AFTER, [Reading(steering(positions))])
    for place, (before, after) in enumerate(zip(PROMPTS, AFTER, strict=True)):
        expected = dense(*(forced(model, before, after, way) for way in (False, steering(positions))))
        torch.testing.assert_close(found.continuation[place], expected, rtol=1e-4, atol=1e-6)


def test_none_is_exactly_zero_and_batches_do_not_matter(model: Any) -> None:
    other = [[9, 9, *row] for row in PROMPTS]
    readings = [Reading(), Reading(steering("generated")), Reading(None, other), Reading(steering(), other)]
    seen: list[int] = []
    together = divergence_from_unsteered(model, PROMPTS, AFTER, readings, report=seen.append)
    alone = divergence_from_unsteered(model, PROMPTS, AFTER, readings, tokens_at_once=1)
    assert sum(seen) == len(PROMPTS) * len(readings)
    for first, second in zip(together, alone, strict=True):
        for a, b in zip(first.continuation, second.continuation, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    nothing = together[0]
    assert nothing.prompt is not None
    assert all(bool((values == 0).all()) for values in [*nothing.prompt, *nothing.continuation])
    assert [len(values) for values in nothing.prompt] == [2, 4, 0]
    assert [len(values) for values in nothing.continuation] == [2, 1, 3]
    assert together[2].prompt is None and float(together[2].continuation[0].min()) > 1e-4


def test_other_prompts_are_compared_on_the_continuation(model: Any) -> None:
    other = [[9, 9, *row] for row in PROMPTS]
    (found,) = divergence_from_unsteered(model, PROMPTS, AFTER, [Reading(steering(), other)])
    for place, (before, told, after) in enumerate(zip(PROMPTS, other, AFTER, strict=True)):
        with torch.no_grad():
            log_p = model.lm(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            ids = torch.tensor([[*told, *after]])
            log_q = model(ids, steering=steering()).logits[0, len(told) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(found.continuation[place], dense(log_p, log_q), rtol=1e-4, atol=1e-6)


def test_the_default_of_the_model_does_not_count(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = divergence_from_unsteered(model, PROMPTS, AFTER, [Reading(steering())])
    monkeypatch.setattr(token_divergence, "POSITIONS_AT_ONCE", 1)
    model.steering = steering()
    try:
        (found,) = divergence_from_unsteered(model, PROMPTS, AFTER, [Reading(steering())])
    finally:
        model.steering = None
    for a, b in zip(found.continuation, expected.continuation, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("after", "other", "told"),
    [(AFTER[:2], None, "each of 3 prompts. Received: 2"), ([[], [1], [2]], None, "empty one"),
     (AFTER, [[1], [2], []], "empty one")],
)  # fmt: skip
def test_what_is_refused(model: Any, after: Any, other: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        divergence_from_unsteered(model, PROMPTS, after, [Reading(None, other)])
