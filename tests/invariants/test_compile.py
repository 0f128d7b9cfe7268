"""`torch.compile(fullgraph=True)`: steered as without it; a structure compiles once, whatever its values."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sae_transformers import FeatureEdit, FeatureReweighting, SaeForCausalLM, Steering
from tests.covering import fast
from tests.invariants.naive import naive_forward
from tests.invariants.test_group_penalties import SEVERAL
from tests.invariants.test_group_penalties import classifier as group_classifier
from tests.invariants.test_group_penalties import texts as group_texts
from tests.invariants.test_steering_grid import OPS, at, padded, scores
from tests.tiny import prompt, tiny_base, tiny_sae

SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
# Inductor needs a C++ compiler and half a minute; what may break is the tracing, which these backends share with it.
EAGER = {"fullgraph": True, "backend": "eager"}


@functools.cache
def model_at(site: str = "resid_post", architecture: str = "llama", activation: str = "topk") -> SaeForCausalLM:
    base = tiny_base(architecture, num_hidden_layers=2)
    base.generation_config.eos_token_id = None
    return SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1, site=site, activation=activation)])


@pytest.fixture(autouse=True)
def no_earlier_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A compiled forward pass and how often it was compiled."""

    def __init__(self, model: Any) -> None:
        self.counter = CompileCounter()
        self.compiled = torch.compile(model, fullgraph=True, backend=self.counter)
        self.model = model

    @torch.no_grad()
    def __call__(self, steering: Any, ids: torch.Tensor | None = None, **options: Any) -> int:
        """Run it, compare with the pass that is not compiled, and return the number of compilations it took."""
        before = self.counter.frame_count
        plan = self.model.prepare_steering(steering)
        ids = prompt() if ids is None else ids
        actual = self.compiled(ids, steering=plan, **options).logits
        expected = self.model(ids, steering=plan, **options).logits
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        return self.counter.frame_count - before


def op_equals_eager(op: str, site: str) -> None:
    model = model_at(site)
    with torch.no_grad():
        plan = model.prepare_steering(OPS[op])
        actual = torch.compile(model, **EAGER)(prompt(), steering=plan).logits
        assert torch.equal(actual, model(prompt(), steering=plan).logits), op
        # The reference hooks the base of the model itself, whose own hooks have nothing to do then.
        expected = naive_forward(model.lm, list(model.saes), OPS[op], prompt())
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), op


@pytest.mark.parametrize("op", fast(["add-max", "different-ops", "erase", "excluded"], "different-ops", "erase"))
def test_op(op):
    op_equals_eager(op, "resid_post")


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_every_op_at_site(site):
    for op in OPS:
        torch._dynamo.reset()
        op_equals_eager(op, site)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("gpt2", "relu"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("opt", "jumprelu"), ("gemma2", "gated"), ("phi", "topk"), ("mistral", "batch_topk"))
        ),
    ],
)
def test_other_families_and_encoders(architecture, activation):
    counted = Counted(model_at("mlp_out", architecture, activation))
    assert counted(OPS["different-ops"]) == 1
    assert counted(at("replaced", [(1, -2)])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_values_latents_and_ops_do_not_recompile(activation):
    """One latent read and changed is one structure, whichever the latent, the op, and the value."""
    counted = Counted(model_at(activation=activation))
    assert counted([FeatureEdit(feature=3, op="set", value=1.0)]) == 1
    for edit in (
        FeatureEdit(feature=3, op="set", value=-2.5),
        FeatureEdit(feature=40, op="set", value=2.0),
        FeatureEdit(feature=7, op="scale", value=-3.0),
        FeatureEdit(feature=11, op="at_least", value=0.5),
        FeatureEdit(feature=0, op="at_most", value=0.1),
        FeatureEdit(feature=63, op="shrink", value=0.2),
        FeatureEdit(feature=9, op="ablate"),
    ):
        assert counted([edit]) == 0, edit


@pytest.mark.slow
def test_other_kinds_of_edit_do_not_recompile_either():
    counted = Counted(model_at())
    pairs = [
        [FeatureEdit(feature=f, op="add", value=v) for f, v in ((3, 1.0), (9, 2.0))],
        [FeatureEdit(feature=f, op="add", value=v) for f, v in ((30, -1.0), (7, 0.5))],
        [FeatureEdit(feature=5, op="direction", value=1.0)],
        [FeatureEdit(feature=6, op="direction", value=-4.0)],
        [FeatureReweighting(scores=scores(1))],
        [FeatureReweighting(scores=scores(2))],
        Steering([FeatureEdit(feature=5, value=2.0)], keep_error=False),
        Steering([FeatureEdit(feature=8, value=-1.0)], keep_error=False),
        Steering([FeatureEdit(feature=5, value=2.0)], balance=True),
        Steering([FeatureEdit(feature=8, op="set", value=-1.0)], balance=True),
        Steering([FeatureEdit(feature=5, op="add", value=0.2, unit="norm")]),
        Steering([FeatureEdit(feature=8, op="add", value=-0.3, unit="norm")]),
        [Steering([FeatureEdit(feature=5, value=2.0)]), None],
        [None, Steering([FeatureEdit(feature=9, op="set", value=1.0)])],
    ]
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert counted(first) == 1, first
        assert counted(second) == 0, second


@pytest.mark.slow
def test_positions_do_not_recompile_but_their_number_does():
    counted = Counted(model_at())
    assert counted(at("set", "all")) == 1
    assert counted(at("set", [(1, 3)])) == 1
    for positions in ([(2, None)], [(-3, -1)], "generated", "prompt", "last_prompt", [(None, -4)]):
        assert counted(at("set", positions)) == 0, positions
    assert counted(at("set", [(1, 3), (5, 6)])) == 1


@torch._dynamo.config.patch(recompile_limit=16)  # there are more than the 8 that torch allows by default
@pytest.mark.slow
def test_another_structure_recompiles():
    counted = Counted(model_at())
    one = [FeatureEdit(feature=3, op="set", value=1.0)]
    assert counted(one) == 1
    for other in (
        [FeatureEdit(feature=3, op="add", value=1.0)],  # known without encoding
        [FeatureEdit(feature=3, op="direction", value=1.0)],
        [*one, FeatureEdit(feature=9, op="set", value=1.0)],  # two latents
        [*one, FeatureEdit(feature=3, op="scale", value=2.0)],  # two stages
        [FeatureEdit(feature=3, op="set", value=1.0, unit="norm")],  # a norm is needed
        Steering(one, keep_error=False),
        Steering(one, balance=True),
        [Steering(one), None],  # a table of rows
    ):
        assert counted(other) == 1, other
        assert counted(other) == 0, other
    assert counted(one) == 0


@pytest.mark.slow
def test_prompt_lengths_recompile_once():
    counted = Counted(model_at())
    assert counted(at("set", [(1, -2)]), prompt(2, 9)) == 1
    assert counted(at("set", [(1, -2)]), prompt(2, 12)) == 1  # from here on the length is dynamic
    for length in (5, 17, 30):
        assert counted(at("set", [(1, -2)]), prompt(2, length)) == 0


@pytest.mark.slow
def test_steering_may_come_from_a_block_or_the_default():
    model = copy.deepcopy(model_at())
    compiled = torch.compile(model, **EAGER)
    with torch.no_grad():
        plain, expected = model(prompt()).logits, model(prompt(), steering=OPS["set"]).logits
        assert torch.equal(compiled(prompt()).logits, plain)
        with model.steered(OPS["set"]):
            assert torch.equal(compiled(prompt()).logits, expected)
        assert torch.equal(compiled(prompt()).logits, plain)


@pytest.mark.slow
def test_features_are_reported_from_a_compiled_pass():
    model = model_at()
    compiled = torch.compile(model, **EAGER)
    with torch.no_grad():
        for options in ({"features": [3, 9]}, {"output_features": True}, {"output_sae_inputs": True}):
            actual, expected = compiled(prompt(), **options), model(prompt(), **options)
            assert torch.equal(actual.logits, expected.logits)
            for name in ("sae_features", "sae_inputs"):
                a, e = getattr(actual, name), getattr(expected, name)
                assert (a is None) == (e is None)
                if a is not None:
                    parts = zip(a[0][:2], e[0][:2], strict=True) if isinstance(a[0], tuple) else [(a[0], e[0])]
                    assert all(torch.equal(x, y) for x, y in parts)


def generated(model: Any, compiled_forward: Any, **options: Any) -> torch.Tensor:
    """Tokens of a static-cache `generate`, whose forward passes are compiled if `compiled_forward` is given."""
    if compiled_forward is not None:
        model.forward = compiled_forward
    try:
        return model.generate(max_new_tokens=6, do_sample=False, cache_implementation="static", **options)
    finally:
        if compiled_forward is not None:
            del model.forward


def static_equals_eager(op: str, site: str, positions: Any) -> None:
    model = model_at(site)
    compiled = torch.compile(model.forward, **EAGER)
    ids, attention = padded()
    for steering in (at(op, positions), [at(op, positions), None]):
        for inputs in ({"input_ids": ids, "attention_mask": attention}, {"input_ids": prompt()}):
            expected = generated(model, None, steering=steering, **inputs)
            assert torch.equal(generated(model, compiled, steering=steering, **inputs), expected)


@pytest.mark.slow
def test_static_cache_generate():
    static_equals_eager("set", "resid_post", [(1, 3), (-1, None)])


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("op", ["add", "set", "direction", "replaced", "swap", "several-on-one"])
def test_static_cache_generate_of_each_kind(op, site):
    for positions in ("all", "generated"):
        torch._dynamo.reset()
        static_equals_eager(op, site, positions)


def test_a_classifier_with_labels_is_one_graph():
    batch, model = group_texts(), group_classifier(None).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, **EAGER)(**batch).loss, model(**batch).loss)


@pytest.mark.slow
def test_group_penalties_are_the_same_in_as_many_graphs_as_it_takes():
    batch, model = group_texts(), group_classifier(SEVERAL).eval()
    found, expected = torch.compile(model, backend="eager")(**batch), model(**batch)
    assert expected.sae_losses["group_a"] > 1e-3
    torch.testing.assert_close(found.loss, expected.loss)
    gradients = torch.autograd.grad(found.loss, model.lm.score.weight)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.loss, model.lm.score.weight))
