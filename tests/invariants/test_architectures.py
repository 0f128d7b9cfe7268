"""19 decoder families x 4 sites: untouched when idle, steered as the naive reference, the same after loading."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.covering import covering
from tests.invariants.naive import Recorder, naive_forward, naive_generate, site_module
from tests.tiny import ARCHITECTURES, prompt, tiny_base, tiny_sae

SITES = ("resid_pre", "resid_post", "mlp_out", "attn_out")
# Mixtures of experts: torch's grouped matrix product does not take float64.
FLOAT32_ONLY = ("mixtral", "qwen2_moe", "gpt_oss")
LAYER = 1
STEERING = Steering(
    [
        FeatureEdit(feature=3, op="add", value=2.0),
        FeatureEdit(feature=7, op="set", value=0.4, unit="norm"),
        FeatureEdit(feature=11, op="scale", value=-3.0),
        FeatureEdit(feature=19, op="direction", value=1.5),
    ],
    positions=[(1, 4), (-2, None)],
)
REPLACED = Steering(STEERING.edits, keep_error=False)

every_place = pytest.mark.parametrize(("architecture", "site"), covering(ARCHITECTURES, SITES, times=len(SITES)))
half_the_places = pytest.mark.parametrize(("architecture", "site"), covering(ARCHITECTURES, SITES, times=2))
a_place_of_each = pytest.mark.parametrize(("architecture", "site"), covering(ARCHITECTURES, SITES))


def dtype_of(architecture: str) -> torch.dtype:
    return torch.float32 if architecture in FLOAT32_ONLY else torch.float64


@functools.cache
def made(architecture: str, site: str, dtype: torch.dtype = torch.float32) -> tuple[SaeForCausalLM, Any, list, Any]:
    """A model, the base it was made from, the SAE as the reference reads it, and an untouched copy of the base."""
    base = tiny_base(architecture, dtype=dtype)
    base.generation_config.eos_token_id = None
    sae = tiny_sae(layer=LAYER, site=site, dtype=dtype)
    bare, own = copy.deepcopy(base), copy.deepcopy(sae)
    return SaeForCausalLM.from_base(base, saes=[sae]), base, [own], bare


@torch.no_grad()
def logits(model, ids: Tensor, **options) -> Tensor:
    return model(ids, **options).logits


def close(actual: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest value in float32, 1e-12 in float64."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-12
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_there_are_nineteen_families():
    assert len(ARCHITECTURES) == 19


@half_the_places
def test_without_an_edit_logits_are_the_bases(architecture, site):
    model, base, _, bare = made(architecture, site)
    expected = logits(bare, prompt())
    attention = torch.ones(2, 9, dtype=torch.long)
    attention[1, :3] = 0
    padded = logits(bare, prompt(), attention_mask=attention)
    for same in (model, model.lm, base):
        assert torch.equal(logits(same, prompt()), expected)
        assert torch.equal(logits(same, prompt(), attention_mask=attention), padded)
    for options in (
        {"output_features": True},
        {"output_sae_inputs": True},
        {"features": [0, 5]},
        {"steering": False},
        {"steering": Steering()},
        {"steering": [None, None]},
    ):
        assert torch.equal(logits(model, prompt(), **options), expected), options
    tokens = bare.generate(prompt(), max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=5, do_sample=False), tokens)


@half_the_places
def test_a_steered_call_leaves_nothing_behind(architecture, site):
    model, base, _, bare = made(architecture, site)
    expected = logits(bare, prompt())
    assert not torch.equal(logits(model, prompt(), steering=STEERING), expected)
    model.generate(prompt(), steering=STEERING, max_new_tokens=2)
    with model.steered(STEERING):
        model(prompt())
    with pytest.raises(RuntimeError, match="in the middle"):  # nor does a call that fails half way
        failing(model)
    for same in (model, model.lm, base):
        assert torch.equal(logits(same, prompt()), expected)
    assert torch.equal(
        model.lm.generate(prompt(), max_new_tokens=3, do_sample=False),
        bare.generate(prompt(), max_new_tokens=3, do_sample=False),
    )


def failing(model) -> None:
    """A steered pass that an error in the last block ends."""

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = site_module(model.lm, 2, "mlp_out").register_forward_hook(fail)
    try:
        model(prompt(), steering=STEERING)
    finally:
        handle.remove()


@every_place
def test_the_sae_reads_what_a_hook_on_the_module_sees(architecture, site):
    model, _, _, bare = made(architecture, site)
    seen = []
    module = site_module(bare, LAYER, site)
    if site == "resid_pre":
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda m, args, out: seen.append(out if torch.is_tensor(out) else out[0])
        )
    logits(bare, prompt())
    handle.remove()
    with torch.no_grad():
        found = model(prompt(), output_sae_inputs=True).sae_inputs[0]
    assert found.shape == (2, 9, 32)
    assert torch.equal(found, seen[0].reshape(2, 9, 32))  # OPT flattens its tokens before the MLP


@half_the_places
def test_steered_logits_and_tokens_are_the_references(architecture, site):
    model, _, saes, bare = made(architecture, site, dtype_of(architecture))
    for steering in (STEERING, REPLACED):
        expected = naive_forward(bare, saes, steering, prompt())
        close(logits(model, prompt(), steering=steering), expected.detach())
    expected = naive_generate(bare, saes, STEERING, prompt(), max_new_tokens=5)
    with Recorder(model.lm) as recorded:
        tokens = model.generate(prompt(), steering=STEERING, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, expected.tokens)
    actual, wanted = recorded.positions(8, 13), expected.logits.positions(8, 13)
    # Attention of gemma2 (soft-capped) is computed in float32, in another order with and without a cache.
    tolerance = 1e-5 if actual.dtype == torch.float32 else 1e-6 if architecture == "gemma2" else 1e-12
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@a_place_of_each
def test_saved_and_loaded_it_is_the_same(architecture, site, tmp_path):
    model, *_ = made(architecture, site)
    scope, model.config.weights_scope = model.config.weights_scope, "full"
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.config.weights_scope = scope
    loaded = SaeForCausalLM.from_pretrained(tmp_path)
    for part in (loaded, loaded.lm):
        assert part.config._attn_implementation == model.lm.config._attn_implementation
    SaeForCausalLM(loaded.config)
    assert torch.equal(logits(loaded, prompt()), logits(model, prompt()))
    assert torch.equal(logits(loaded, prompt(), steering=STEERING), logits(model, prompt(), steering=STEERING))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_agree_with_each_other(architecture):
    """Blocks end in `h + mlp(...)`: adding at the MLP's output is adding at the block's. The input of a block is the
    output of the one before. In a block that is not parallel, what attention adds reaches the MLP too."""
    dtype = dtype_of(architecture)
    base = tiny_base(architecture, dtype=dtype)
    places = [(1, "mlp_out"), (1, "resid_post"), (2, "resid_pre"), (1, "attn_out")]
    saes = [tiny_sae(layer=layer, site=site, dtype=dtype) for layer, site in places]
    model = SaeForCausalLM.from_base(base, saes=saes)
    with torch.no_grad():
        mlp, post, pre, attention = model(prompt(), output_sae_inputs=True).sae_inputs
    assert torch.equal(post, pre)
    assert not torch.equal(mlp, post)
    assert not torch.equal(mlp, attention)
    added = [Steering([FeatureEdit(sae=n, feature=3, op="direction", value=2.0)]) for n in range(4)]
    at_mlp, at_post, at_pre, at_attention = (logits(model, prompt(), steering=s) for s in added)
    close(at_mlp, at_post)
    assert torch.equal(at_post, at_pre)
    parallel = architecture in ("gpt_neox", "phi", "cohere", "falcon")
    assert torch.allclose(at_attention, at_post, rtol=1e-6) == parallel
