"""Which steering is a constant vector: against what a steered block returns, and every refusal by its field."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, Gate, SaeForCausalLM, Steering, Strength
from sae_transformers.workflows.steering.export.constant_vectors import constant_vectors
from tests.tiny import tiny_base, tiny_sae

CONSTANT = FeatureEdit(0, 3, "direction", 2.0)


def steered_model(**settings: Any) -> SaeForCausalLM:
    saes = [tiny_sae(layer=1, **settings), tiny_sae(seed=2, layer=2), tiny_sae(seed=3, layer=1)]
    return SaeForCausalLM.from_base(tiny_base(), saes=saes)


@torch.no_grad()
def added(model: SaeForCausalLM, steering: Steering, layer: int) -> torch.Tensor:
    """What the steering adds to what a block returns, (seq, d_model)."""
    found = []
    handle = model.lm.model.layers[layer].register_forward_hook(lambda *a: found.append(a[2]))
    ids = torch.arange(3, 9)[None]
    for one in (False, steering):
        model(ids, steering=one)
    handle.remove()
    return (found[1] - found[0])[0]


def test_edits_of_one_block_are_summed_in_all_units_that_are_constant() -> None:
    model = steered_model(normalization="scalar", input_scale=0.5)
    edits = [CONSTANT, FeatureEdit(0, 5, "add", 0.7), FeatureEdit(2, 3, "direction", -1.5, "max")]
    steering = Steering(edits)
    vectors = constant_vectors(model, steering)
    assert list(vectors) == [1] and vectors[1].dtype == torch.float32
    torch.testing.assert_close(vectors[1].expand(6, -1), added(model, steering, 1), rtol=0, atol=1e-5)
    both = constant_vectors(model, Steering([CONSTANT, FeatureEdit(1, 0, "direction", 1.0)], [(None, None)]))
    assert list(both) == [1, 2]
    assert torch.equal(both[1], 2 * model.saes[0].W_dec[3]) and torch.equal(both[2], model.saes[1].W_dec[0])


GATE = Gate(feature=3, above=1.0)
REFUSED = {
    "positions='generated'": Steering([CONSTANT], "generated"),
    "keep_error=False": Steering([CONSTANT], keep_error=False),
    "reconstruct=(0,)": Steering([CONSTANT], reconstruct=(0,)),
    "balance=True": Steering([CONSTANT], balance=True),
    "when=Gate": Steering([CONSTANT], when=GATE),
    "strength=Strength": Steering([CONSTANT], strength=Strength(first=3)),
    "exclude_tokens=(7,)": Steering([CONSTANT], exclude_tokens=[7]),
    "edits[1].when=Gate": Steering([CONSTANT, FeatureEdit(0, 1, "direction", 1.0, when=GATE)]),
    "edits[0].strength=Strength": Steering([FeatureEdit(0, 1, "direction", 1.0, strength=Strength(first=3))]),
    "edits[0].exclude_tokens=(7,)": Steering([FeatureEdit(0, 1, "direction", 1.0, exclude_tokens=[7])]),
    "edits[0].unit='norm'": Steering([FeatureEdit(0, 1, "direction", 1.0, "norm")]),
    "edits[1].mode='swap'": Steering([CONSTANT, FeatureReweighting(0, [1.0] * 64)]),
    "no edit": Steering(),
} | {
    f"edits[0].op='{op}'": Steering([FeatureEdit(0, 1, op, None if op in ("ablate", "erase") else 1.0)])
    for op in ("scale", "set", "ablate", "erase", "at_least", "at_most", "shrink", "scale_magnitude")
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_all_else_is_refused_by_its_field(field: str) -> None:
    with pytest.raises(ValueError) as caught:
        constant_vectors(steered_model(), REFUSED[field])
    assert f"Received: {field}" in str(caught.value) and "Expected" in str(caught.value)


def test_an_sae_that_scales_each_token_is_refused_for_add_and_not_for_directions() -> None:
    model = steered_model(normalization="layer_norm")
    assert list(constant_vectors(model, Steering([CONSTANT]))) == [1]
    with pytest.raises(ValueError, match=r"SAE with layer_norm .* Received: edits\[0\].op='add'"):
        constant_vectors(model, Steering([FeatureEdit(0, 3, "add", 2.0)]))


@pytest.mark.parametrize("site", ["mlp_out", "resid_pre"])
def test_another_place_is_refused(site: str) -> None:
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(layer=1, site=site)])
    with pytest.raises(ValueError, match=f"SAE 0, which writes at 'layers.1.{site}'"):
        constant_vectors(model, Steering([CONSTANT]))


def test_a_module_path_of_a_block_is_its_layer() -> None:
    model = SaeForCausalLM.from_base(tiny_base(), saes=[tiny_sae(hook="model.layers.2")])
    assert list(constant_vectors(model, Steering([CONSTANT]))) == [2]
