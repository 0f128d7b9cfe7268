"""The edit of SpARE (https://huggingface.co/papers/2410.15999) as a `Steering`, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import FeatureEdit, SparseAutoencoder, SparseAutoencoderConfig, Steering
from sae_transformers.modeling.call_record import CallRequest
from sae_transformers.modeling.sae_steering import serve
from sae_transformers.modeling.steering_plan import SteeringPlan
from tests.tiny import prompt, tiny_model, tiny_sae

F64 = torch.float64
Z_C, Z_M = [1.0, 0.6, 0.3, 0.2], [0.4, 0.9, 2.0, 0.1]
CONTEXT, MEMORY = (0, 1), (2, 3)


@pytest.fixture
def toy() -> SparseAutoencoder:
    config = SparseAutoencoderConfig(
        d_in=3, d_sae=4, activation="relu", apply_b_dec_to_input=True, layer=0, site="resid_post"
    )
    sae = SparseAutoencoder(config, dtype=F64)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]))
        sae.W_enc.copy_(torch.tensor([[1, 0, 0], [0, 2, 0], [0, 0, 1], [0.5, 0.5, -1]]).T)
        sae.b_enc.copy_(torch.tensor([0, -1, 0.5, 0]))
        sae.b_dec.copy_(torch.tensor([0.5, 0, -0.5]))
    return sae


HIDDEN = torch.tensor([[[2.0, 1.0, 0.25]]], dtype=F64)
LATENTS = [1.5, 1.0, 1.25, 0.5]


def swap(remove, add, removed, added, alpha: float) -> Steering:
    """Remove `min(alpha*z, .)` of the latents `remove` and raise the latents `add` to `alpha` times their value."""
    return Steering(
        [FeatureEdit(0, i, "shrink", alpha * removed[i]) for i in remove]
        + [FeatureEdit(0, i, "at_least", alpha * added[i]) for i in add],
        positions="last_prompt",
    )


def edited(sae: SparseAutoencoder, steering: Steering, hidden=HIDDEN) -> list[float]:
    request = CallRequest(1, 1, SteeringPlan([steering], [sae.config], [hidden]))
    return request.edit(hidden, sae(hidden, request, 0, task=serve))[0, -1].tolist()


def by_formula(sae: SparseAutoencoder, remove, add, removed, added, alpha: float) -> list[float]:
    """h + (-r + a) W_dec with r_i = min(alpha*removed_i, z_i), a_i = max(alpha*added_i - z_i, 0)."""
    z = torch.tensor(LATENTS, dtype=F64)
    r, a = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)
    for i in remove:
        r[i] = min(alpha * removed[i], float(z[i]))
    for i in add:
        a[i] = max(alpha * added[i] - float(z[i]), 0.0)
    return (HIDDEN[0, 0] + (a - r) @ sae.W_dec).tolist()


def test_latents(toy):
    assert toy.encode(HIDDEN)[0, 0].tolist() == LATENTS


@pytest.mark.parametrize(
    ("alpha", "use", "expected"),
    [
        (1.0, "parameter", [1.0, 0.4, 1.0]),
        (2.0, "parameter", [0.5, 0.0, 3.0]),
        (1.0, "context", [1.9, 0.9, -1.0]),
        (2.0, "context", [2.3, 1.0, -1.0]),
    ],
)
def test_toy_edit(toy, alpha, use, expected):
    sides = (CONTEXT, MEMORY, Z_C, Z_M) if use == "parameter" else (MEMORY, CONTEXT, Z_M, Z_C)
    assert edited(toy, swap(*sides, alpha)) == pytest.approx(expected, abs=1e-12)
    assert by_formula(toy, *sides, alpha) == pytest.approx(expected, abs=1e-12)


def test_paper_formula(toy):
    """The paper's h + alpha*(-g(r) + g(a)) with unscaled targets removes more than the code does: scaled changes of
    each latent are `add`s."""
    z = LATENTS
    r = [min(Z_C[i], z[i]) if i in CONTEXT else 0.0 for i in range(4)]
    a = [max(Z_M[i] - z[i], 0.0) if i in MEMORY else 0.0 for i in range(4)]
    steering = Steering([FeatureEdit(0, i, "add", 2.0 * (a[i] - r[i])) for i in range(4)])
    assert edited(toy, steering) == pytest.approx([0.0, -0.2, 1.75], abs=1e-12)


def test_decoder_bias_cancels(toy):
    """The bias is in the removed and in the added vector alike, so a change of it in the decoder alone changes
    nothing."""
    steering = swap(CONTEXT, MEMORY, Z_C, Z_M, 1.0)
    before = edited(toy, steering)
    with torch.no_grad():  # the encoder sees x - b_dec: compensate there
        shift = torch.tensor([10.0, -7.0, 3.0], dtype=F64)
        toy.b_dec += shift
        toy.b_enc += shift @ toy.W_enc
    assert edited(toy, steering) == pytest.approx(before, abs=1e-12)


def test_nothing_selected_changes_nothing(toy):
    assert edited(toy, swap((), (), Z_C, Z_M, 2.0)) == HIDDEN[0, 0].tolist()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_removal_never_exceeds_the_activation(toy, alpha):
    hidden = torch.randn(50, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    plan = SteeringPlan([Steering([FeatureEdit(0, 0, "shrink", alpha)])], [toy.config], [hidden])
    request = CallRequest(50, 1, plan)
    change = request.edit(hidden, toy(hidden, request, 0, task=serve)) - hidden
    removed = -change @ torch.tensor([1.0, 0.0, 0.0], dtype=F64)  # along the decoder row of latent 0
    assert bool((removed <= toy.encode(hidden)[..., 0] + 1e-12).all())
    assert bool((removed >= 0).all())


def test_only_the_last_prompt_token_is_edited():
    """With the cache the edit is made once, in the prefill, and lives on in the keys and values above."""
    model = tiny_model(saes=[tiny_sae(dtype=F64, activation="jumprelu", layer=0)], dtype=F64)
    ids = prompt(2, 7)
    changed = []
    handle = model.lm.model.layers[0].register_forward_hook(lambda module, args, out: changed.append(out))
    edits = [FeatureEdit(0, i, "shrink", 0.3) for i in range(0, 32)]
    edits += [FeatureEdit(0, i, "at_least", 0.8) for i in range(32, 64)]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, steering=False, **options)
    bare, changed[:] = list(changed), []
    steered = model.generate(ids, steering=Steering(edits, positions="last_prompt"), **options)
    handle.remove()
    assert torch.equal(changed[0][:, :-1], bare[0][:, :-1])
    assert (changed[0][:, -1] - bare[0][:, -1]).abs().max() > 0.1
    assert not torch.equal(plain, steered)
    whole = model.generate(ids, steering=Steering(edits, positions="last_prompt"), use_cache=False, **options)
    assert torch.equal(whole, steered)


def test_edits_of_several_layers_are_chained():
    """A later layer's latents are computed on the stream that the earlier one edited."""
    saes = [tiny_sae(seed=s, dtype=F64, activation="relu", layer=s) for s in (0, 1)]
    model = tiny_model(saes=saes, dtype=F64)
    ids = prompt(1, 5)
    both = Steering([FeatureEdit(0, 3, "add", 5.0), FeatureEdit(1, 7, "scale", 2.0)])
    with torch.no_grad():
        seen = model(ids, steering=both, output_sae_inputs=True).sae_inputs[1]
        first_only = model(ids, steering=Steering(both.edits[:1]), output_sae_inputs=True).sae_inputs[1]
        bare = model(ids, output_sae_inputs=True).sae_inputs[1]
    assert torch.equal(seen, first_only)
    assert (seen - bare).abs().max() > 0.1
