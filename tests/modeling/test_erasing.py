"""Op `erase`: what is left of a concept in the hidden state, beside what `ablate` leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering, direction_sae
from sae_transformers.modeling.steering_plan import SaePlan
from tests.invariants.naive import latents_of, reconstruction_of
from tests.tiny import WIDTH, prompt, tiny_base, tiny_sae

FEATURES = (3, 9, 20)


def states(count: int = 6, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def edits(op: str, features: Any = FEATURES) -> list[FeatureEdit]:
    return [FeatureEdit(feature=f, op=op) for f in features]


def edited(sae: Any, steering: Steering, hidden: Tensor, target: Tensor | None = None) -> Tensor:
    plan = SaePlan(0, sae.config, [steering], torch.empty(0, dtype=hidden.dtype))
    return sae.steer_tokens(hidden, plan, target=target)


def test_the_error_loses_the_span_and_the_reconstruction_keeps_its_rest():
    sae, hidden = tiny_sae(dtype=torch.float64, activation="relu"), states()
    z = latents_of(sae, hidden)
    z[:, FEATURES] = 0
    kept = z @ sae.W_dec + sae.b_dec  # biases and other latents stay, whatever they write along the rows
    error = hidden - reconstruction_of(sae, hidden)
    basis, _ = torch.linalg.qr(sae.W_dec[list(FEATURES)].T)
    found = edited(sae, Steering(edits("erase")), hidden)
    assert torch.allclose(found, kept + error - error @ basis @ basis.T, atol=1e-12)
    assert ((found - kept) @ basis).abs().max() < 1e-12
    ablated = edited(sae, Steering(edits("ablate")), hidden)
    assert torch.allclose(ablated - kept, error, atol=1e-12) and (error @ basis).abs().max() > 0.1


def test_rows_that_coincide_or_are_zero_span_what_they_do():
    sae, hidden = tiny_sae(dtype=torch.float64, activation="relu"), states()
    with torch.no_grad():
        sae.W_dec[9] = -2.5 * sae.W_dec[3]
        sae.W_dec[20] = 0
        sae.W_dec[21] = sae.W_dec[3] + 1e-9 * sae.W_dec[4]  # the difference is rounding
    kept = hidden - latents_of(sae, hidden)[:, [3, 9, 20, 21]] @ sae.W_dec[[3, 9, 20, 21]]
    error, unit = hidden - reconstruction_of(sae, hidden), sae.W_dec[3] / sae.W_dec[3].norm()
    found = edited(sae, Steering(edits("erase", (3, 9, 20, 21))), hidden)
    assert torch.allclose(found, kept - (error @ unit)[:, None] * unit, atol=1e-6)
    assert found.isfinite().all()


def test_nearly_coinciding_rows_in_single_precision():
    sae, hidden = tiny_sae(activation="relu"), states().float()
    with torch.no_grad():
        sae.W_dec[9] = sae.W_dec[3] + 1e-4 * sae.W_dec[5]
    wide = tiny_sae(activation="relu", dtype=torch.float64)
    wide.load_state_dict(sae.state_dict())
    found = edited(sae, Steering(edits("erase", (3, 9))), hidden)
    assert torch.allclose(found.double(), edited(wide, Steering(edits("erase", (3, 9))), hidden.double()), atol=1e-5)


def test_a_direction_of_ones_own_leaves_the_whole_state():
    """An SAE of directions reconstructs along them and nothing else."""
    sae = tiny_sae(activation="topk", layer=1)
    directions = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    own, hidden = direction_sae(directions, sae.config), states().float()
    basis, _ = torch.linalg.qr(directions.T)
    found = edited(own, Steering(edits("erase", (0, 1))), hidden)
    assert torch.allclose(found, hidden - hidden @ basis @ basis.T, atol=1e-5)
    model = SaeForCausalLM.from_base(tiny_base(), saes=[sae, own])
    steering = Steering([FeatureEdit(sae=1, feature=f, op="erase") for f in (0, 1)])
    with torch.no_grad():
        model(prompt(), steering=steering)
        read = model(prompt(), steering=steering, output_hidden_states=True).hidden_states[2]
    assert (
        (read @ basis).abs().max()
        < 1e-4
        < (model(prompt(), output_hidden_states=True).hidden_states[2] @ basis).abs().max()
    )


def test_a_transcoder_is_erased_from_what_it_does_not_write():
    sae = tiny_sae(dtype=torch.float64, activation="relu", d_in=WIDTH, d_out=16, hook="a", hook_out="b",
                   apply_b_dec_to_input=False)  # fmt: skip
    hidden, target = states(), states(width=16)
    error = target - reconstruction_of(sae, hidden)
    basis, _ = torch.linalg.qr(sae.W_dec[list(FEATURES)].T)
    kept = target - latents_of(sae, hidden)[:, FEATURES] @ sae.W_dec[list(FEATURES)]
    found = edited(sae, Steering(edits("erase")), hidden, target)
    assert torch.allclose(found, kept - error @ basis @ basis.T, atol=1e-12)


def test_gradients_reach_the_state_and_stay_finite():
    sae, hidden = tiny_sae(dtype=torch.float64, activation="relu"), states().requires_grad_()
    with torch.no_grad():
        sae.W_dec[9] = sae.W_dec[3]  # a singular Gram matrix
    edited(sae, Steering(edits("erase")), hidden).square().sum().backward()
    assert hidden.grad is not None and sae.W_dec.grad is not None
    assert hidden.grad.isfinite().all() and sae.W_dec.grad.isfinite().all()


def test_without_the_error_there_is_nothing_to_erase_from():
    sae, hidden = tiny_sae(dtype=torch.float64), states()
    erased, ablated = (edited(sae, Steering(edits(op), keep_error=False), hidden) for op in ("erase", "ablate"))
    assert torch.equal(erased, ablated)


@pytest.mark.parametrize("op", ["erase", "ablate"])
def test_what_it_does_not_take(op: str):
    with pytest.raises(ValueError, match=f"`{op}` takes no value.*Received: value=1.0"):
        FeatureEdit(feature=1, op=op, value=1.0)
    with pytest.raises(ValueError, match=f"`{op}` is relative already.*Received: unit='norm'"):
        FeatureEdit(feature=1, op=op, unit="norm")
