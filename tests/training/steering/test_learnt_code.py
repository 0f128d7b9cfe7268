"""A code that is trained: its gradient, its losses, and what it computes against a naive reference and `generate`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, Gate, LearnSteeringSettings, SaeForCausalLM, Steering
from sae_transformers.training.steering.code_training import AnswerRow, base_log_probs, collated, losses, measured
from sae_transformers.training.steering.learnt_code import LearntCode, frozen
from sae_transformers.training.steering.preference_losses import (
    likelihood_loss,
    preference_loss,
    preference_margins,
    response_log_probs,
)
from tests.tiny import VOCAB, tiny_base, tiny_sae

FEATURES = [(1, 5), (0, 9), (0, 3), (1, 2)]  # not in the order of any table
VALUES = [0.11, -0.07, 0.2, 0.05]
SAES: tuple[dict[str, Any], ...] = (
    {"layer": 0, "site": "resid_post", "activation": "relu"},
    {"layer": 2, "site": "mlp_out", "activation": "topk", "normalization": "layer_norm"},
)


def new_model(dtype: torch.dtype = torch.float64) -> Any:
    """GPT-2, which computes in double precision throughout; the norms of Llama do not."""
    saes = [tiny_sae(seed=seed, dtype=dtype, **settings) for seed, settings in enumerate(SAES)]
    model = SaeForCausalLM.from_base(tiny_base("gpt2", dtype=dtype), saes=saes).eval()
    return model.requires_grad_(False)


def new_rows(n: int, seed: int = 0) -> list[AnswerRow]:
    draw = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    return [AnswerRow(some(2, 7), some(1, 6), some(1, 6)) for _ in range(n)]


def code_of(model: Any, form: str, unit: str, scope: Steering | None = None, values: Any = None) -> LearntCode:
    code = LearntCode(model, FEATURES, form, unit, scope)
    with torch.no_grad():
        code.values.copy_(torch.tensor(VALUES if values is None else values))
    return code


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model()


@pytest.mark.parametrize("unit", ["norm", "absolute", "max"])
@pytest.mark.parametrize("form", ["direction", "code"])
@pytest.mark.parametrize("kind", ["preference", "both ways", "likelihood"])
def test_the_gradient_is_that_of_finite_differences(model, form, unit, kind):
    settings = LearnSteeringSettings(
        loss="likelihood" if kind == "likelihood" else "preference", both_ways=kind == "both ways", beta=0.7
    )
    rows = new_rows(3)
    if kind == "likelihood":
        rows = [row._replace(rejected=None) for row in rows]
    code = code_of(model, form, unit)
    base, batch = base_log_probs(code, rows, 2), collated(rows)

    def loss_at(values: Tensor) -> float:
        with torch.no_grad():
            code.values.copy_(values)
            return float(losses(code, batch, base, settings)[0])

    start = code.values.detach().clone()
    losses(code, batch, base, settings)[0].backward()
    assert code.values.grad is not None
    step = 1e-6
    for i in range(len(FEATURES)):
        nudge = torch.zeros_like(start).index_fill(0, torch.tensor([i]), step)
        slope = (loss_at(start + nudge) - loss_at(start - nudge)) / (2 * step)
        assert float(code.values.grad[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert bool((code.values.grad != 0).all())


def by_hand(model: Any, ids: list[int], form: str, unit: str, sign: float, start: int) -> Tensor:
    """Logits (seq, vocabulary) of one text under the values, written out: from position `start` on."""
    handles = []
    blocks = model.lm.transformer.h
    for number, (sae, place) in enumerate(zip(model.saes, (blocks[0], blocks[2].mlp), strict=True)):
        own = [(f, sign * v) for (s, f), v in zip(FEATURES, VALUES, strict=True) if s == number]

        def change(module: Any, args: Any, output: Any, sae: Any = sae, own: Any = own) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            result = sae(hidden)
            added = torch.zeros_like(hidden)
            scale = hidden.std(-1, keepdim=True) if sae.config.normalization == "layer_norm" else 1.0
            for feature, value in own:
                row = sae.W_dec[feature]
                worth = {"absolute": 1.0, "max": sae.feature_max[feature]}.get(unit)
                if form == "direction":
                    own_worth = hidden.norm(dim=-1) / row.norm() if worth is None else worth
                    added = added + (value * own_worth * torch.ones_like(hidden[..., 0]))[..., None] * row
                    continue
                own_worth = hidden.norm(dim=-1) / row.norm() / _squeezed(scale) if worth is None else worth
                z = result.latents[..., feature]
                added = added + ((z + value * own_worth).clamp(min=0) - z)[..., None] * row * scale
            added[:, :start] = 0.0
            return (hidden + added, *output[1:]) if isinstance(output, tuple) else hidden + added

        handles.append(place.register_forward_hook(change))
    bare = model.unwrap()
    try:
        return bare(torch.tensor([ids])).logits[0]
    finally:
        model.rewrap()
        for handle in handles:
            handle.remove()


def _squeezed(scale: Any) -> Any:
    return scale[..., 0] if isinstance(scale, Tensor) else scale


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("unit", ["norm", "absolute", "max"])
@pytest.mark.parametrize("form", ["direction", "code"])
def test_answers_are_as_likely_as_in_a_reference_written_out(model, form, unit, positions):
    rows = new_rows(3, seed=5)
    code = code_of(model, form, unit, Steering(positions=positions))
    for sign in (1.0, -1.0):
        with torch.no_grad():
            found = code(**collated(rows), sign=sign)
        texts = [(r.prompt, r.chosen) for r in rows] + [(r.prompt, r.rejected or []) for r in rows]
        for number, (prompt, answer) in enumerate(texts):
            start = 0 if positions == "all" else len(prompt) - 1
            logits = by_hand(model, [*prompt, *answer], form, unit, sign, start)
            said = logits[len(prompt) - 1 : -1].log_softmax(-1)
            expected = sum(float(said[i, token]) for i, token in enumerate(answer))
            assert float(found[number]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["direction", "code"])
def test_a_saved_steering_gives_the_logits_of_the_trained_values_bit_for_bit(model, form):
    code = code_of(model, form, "norm", Steering(positions=[(1, None)], exclude_tokens=[7]))
    saved = Steering.from_json(code.steering().to_json())
    ids = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        trained, loaded = model(ids, steering=code.plan()).logits, model(ids, steering=saved).logits
        assert torch.equal(trained, loaded)
        assert not torch.equal(trained, model(ids, steering=False).logits)


def test_answers_are_as_likely_as_generate_finds_them_with_gates_and_left_out_tokens(model):
    scope = Steering(
        positions="generated",
        when=Gate(feature=4, over="prompt", pre_activations=True, above=0.1) | Gate(feature=8, over="so_far"),
        exclude_tokens=[9, 11],
    )
    code = code_of(model, "direction", "norm", scope, [0.4, -0.5, 0.6, 0.3])
    moved = 0
    for seed in range(6):
        prompt = torch.randint(3, VOCAB, (1, 5), generator=torch.Generator().manual_seed(seed))
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
        out = model.generate(
            prompt, steering=code.steering(), return_dict_in_generate=True, eos_token_id=None, **options
        )
        answer = out.sequences[0, 5:].tolist()
        scores = torch.stack(out.scores)[:, 0].double().log_softmax(-1)
        expected = sum(float(scores[i, token]) for i, token in enumerate(answer))
        batch = collated([AnswerRow(prompt[0].tolist(), answer)])
        with torch.no_grad():
            found, plain = float(code(**batch)), float(code(**batch, sign=None))
        assert found == pytest.approx(expected, abs=1e-5)  # scores are in single precision
        moved += abs(found - plain) > 1e-3
    assert moved > 0


def test_losses_are_those_of_their_equations():
    margins = preference_margins(*(torch.tensor([x, 0.0]) for x in (-1.0, -2.5, -1.4, -2.2)))
    assert margins.tolist() == pytest.approx([(-1.0 + 1.4) - (-2.5 + 2.2), 0.0])
    expected = (-math.log(1 / (1 + math.exp(-0.5 * 0.7))) + math.log(2)) / 2
    assert float(preference_loss(margins, 0.5)) == pytest.approx(expected)
    assert float(likelihood_loss(torch.tensor([-4.0, -3.0]), torch.tensor([2, 3]))) == pytest.approx(1.5)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]])
    response = torch.tensor([[False, False, True, True], [False, True, False, False]])
    logs = logits.log_softmax(-1)
    found = response_log_probs(logits, ids, response)
    assert found.tolist() == pytest.approx([float(logs[0, 1, 3] + logs[0, 2, 4]), float(logs[1, 0, 1])], rel=1e-6)


def test_both_ways_is_the_mean_of_the_values_and_their_opposite(model):
    rows = new_rows(4, seed=2)
    code = code_of(model, "direction", "norm")
    base, batch = base_log_probs(code, rows, 4), collated(rows)
    one, both = (LearnSteeringSettings(both_ways=both, beta=0.3) for both in (False, True))
    swapped = [AnswerRow(r.prompt, r.rejected or [], r.chosen) for r in rows]
    with torch.no_grad():
        forward = losses(code, batch, base, one)[0]
        together = losses(code, batch, base, both)[0]
        code.values.neg_()
        back = losses(code, collated(swapped), base_log_probs(code, swapped, 4), one)[0]
    assert float(together) == pytest.approx(float(forward + back) / 2, rel=1e-9)
    assert float(forward) != pytest.approx(float(back), rel=1e-3)


def test_measures_are_those_of_all_rows_whatever_the_batches(model):
    rows = new_rows(5, seed=3)
    code = code_of(model, "code", "norm")
    found = [measured(code, rows, LearnSteeringSettings(batch_size=size)) for size in (1, 2, 5)]
    for one in found[1:]:
        assert one.loss == pytest.approx(found[0].loss, rel=1e-9) and one.preferred == found[0].preferred
    base = base_log_probs(code, rows, 5)
    with torch.no_grad():
        steered = torch.stack([code(**collated([row])) for row in rows])
    gained = (steered[:, 0] - base[:, 0]) - (steered[:, 1] - base[:, 1])
    assert found[0].preferred == float((gained > 0).double().mean())


def test_the_largest_writes_are_kept_in_their_unit(model):
    code = code_of(model, "direction", "absolute", values=[0.1, 0.1, 0.1, 0.1])
    written = [0.1 * float(model.saes[sae].W_dec[feature].norm()) for sae, feature in FEATURES]
    assert code.lengths(code.values).tolist() == pytest.approx(written)
    code.keep(2)
    best = sorted(range(4), key=lambda i: -written[i])[:2]
    assert [i for i in range(4) if code.values[i] != 0] == sorted(best)
    assert {(e.sae, e.feature) for e in code.steering().feature_edits} == {FEATURES[i] for i in best}
    at_most = code_of(model, "direction", "max", values=[0.1] * 4)
    maxima = [float(model.saes[sae].feature_max[feature]) for sae, feature in FEATURES]
    assert at_most.lengths(at_most.values).tolist() == pytest.approx(
        [length * largest for length, largest in zip(written, maxima, strict=True)]
    )


def test_a_frozen_model_comes_back_as_it_was():
    model = new_model(dtype=torch.float32)
    model.lm.transformer.h[0].requires_grad_(True)
    model.lm.transformer.h[1].train()
    asked = [p.requires_grad for p in model.parameters()]
    training = [m.training for m in model.modules()]
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert [m.training for m in model.modules()] == training


def test_the_plans_of_the_model_are_not_touched(model):
    zero = Steering([FeatureEdit(sae, feature, "direction", 0.0, "norm") for sae, feature in FEATURES])
    ids = torch.arange(4, 10)[None]
    code = code_of(model, "direction", "norm")
    code.plan()
    with torch.no_grad():
        assert torch.equal(model(ids, steering=zero).logits, model(ids, steering=False).logits)
