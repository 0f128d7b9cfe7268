"""Re-weighting of the whole code as in topic alignment (https://huggingface.co/papers/2506.12576), against numbers
worked out by hand."""

from __future__ import annotations

import pytest
import torch

from sae_transformers import FeatureEdit, FeatureReweighting, SparseAutoencoder, SparseAutoencoderConfig, Steering
from sae_transformers.modeling.call_record import CallRecord
from sae_transformers.modeling.steering_plan import SteeringPlan
from tests.tiny import prompt, tiny_model, tiny_sae

F64 = torch.float64
HIDDEN = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=F64)
SCORES = (0.9, 1.0, 0.2, 0.5)


def steered(sae: SparseAutoencoder, steering: Steering, hidden: torch.Tensor = HIDDEN) -> list[float]:
    record = CallRecord(*hidden.shape[:2])
    record.plan = SteeringPlan([steering], [sae.config], [hidden])
    return record.edit(hidden, sae(hidden, record, number=0))[0, -1].tolist()


def identity_sae(width: int, pre_acts: list[float]) -> tuple[SparseAutoencoder, torch.Tensor]:
    """An SAE whose pre-activations are its input and whose decoder is the identity: outputs are latents."""
    config = SparseAutoencoderConfig(d_in=width, d_sae=width, activation="topk", k=2, layer=0)
    sae = SparseAutoencoder(config, dtype=F64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc.copy_(torch.eye(width))
        sae.W_dec.copy_(torch.eye(width))
    return sae, torch.tensor([[pre_acts]], dtype=F64)


@pytest.mark.parametrize(("mode", "latents"), [("weight", [0, 1, 1.5, 0, 0]), ("swap", [0, 2, 1.5, 0, 0])])
def test_fact_b_swap_against_weight(mode, latents):
    sae, hidden = identity_sae(5, [3.0, 2.0, 1.5, -1.0, 0.5])
    reweighted = FeatureReweighting(0, (0.1, 0.5, 1.0, 0.9, 0.8), mode)
    assert steered(sae, Steering([reweighted], keep_error=False), hidden) == pytest.approx(latents, abs=1e-12)
    # with the error kept, only the difference of the two codes is added
    plain = [3.0, 2.0, 0.0, 0.0, 0.0]
    expected = [h + new - old for h, new, old in zip(hidden[0, 0].tolist(), latents, plain, strict=True)]
    assert steered(sae, Steering([reweighted]), hidden) == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def toy() -> SparseAutoencoder:
    config = SparseAutoencoderConfig(d_in=3, d_sae=4, activation="topk", k=2, normalization="layer_norm", layer=0)
    sae = SparseAutoencoder(config, dtype=F64)
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], dtype=F64)
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc.copy_(torch.tensor([0.1, 0.5, 0, 0.2]))
        sae.b_dec.copy_(torch.tensor([0.1, 0, -0.1]))
    return sae


def test_fact_c_pre_activations_and_code(toy):
    assert toy.encode_pre_acts(HIDDEN)[0, 0].tolist() == pytest.approx([-0.8729, 0.2818, 1.1911, 1.1729], abs=1e-4)
    assert toy.encode(HIDDEN)[0, 0].tolist() == pytest.approx([0, 0, 1.1911, 1.1729], abs=1e-4)
    assert toy(HIDDEN).reconstruction[0, 0].tolist() == pytest.approx([0.6945, 2.3333, 4.0], abs=1e-4)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (FeatureReweighting(0, SCORES, "swap"), [0.6945, 2.7638, 2.1806]),
        (FeatureReweighting(0, SCORES, "weight", legacy=True), [0.4445, 0.7691, 0.6077]),
        (FeatureReweighting(0, (0.0,) * 4, "swap"), [2.4861, 2.3333, 2.1806]),
    ],
)
def test_fact_c_outputs(toy, edit, expected):
    assert steered(toy, Steering([edit], keep_error=False)) == pytest.approx(expected, abs=1e-4)


def test_fact_c_weight_with_the_tokens_own_statistics(toy):
    """latents [0, .2818, 0, .5864], decoded with the token's mean and deviation."""
    mean, std = HIDDEN.mean(), HIDDEN.std()
    latents = torch.tensor([0, 0.2818, 0, 0.5864], dtype=F64)
    expected = ((latents @ toy.W_dec + toy.b_dec) * std + mean).tolist()
    out = steered(toy, Steering([FeatureReweighting(0, SCORES, "weight")], keep_error=False))
    assert out == pytest.approx(expected, abs=2e-4)


def test_fact_c_clamp_adds(toy):
    steering = Steering([FeatureEdit(0, 0, "add", 10.0), FeatureEdit(0, 1, "add", 10.0)], keep_error=False)
    assert steered(toy, steering) == pytest.approx([15.9698, 17.6086, 4.0], abs=1e-4)


def test_constant_scores_swap_nothing(toy):
    swap = Steering([FeatureReweighting(0, (0.3,) * 4, "swap")], keep_error=False)
    assert steered(toy, swap) == toy(HIDDEN).reconstruction[0, 0].tolist()


def test_swap_support_and_values():
    sae = tiny_sae(dtype=F64, k=6, layer=1)
    hidden = torch.randn(40, 1, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    record = CallRecord(40, 1)
    steering = Steering([FeatureReweighting(0, scores, "swap")], keep_error=False)
    record.plan = SteeringPlan([steering], [sae.config], [hidden])
    out = record.edit(hidden, sae(hidden, record, number=0))
    p = (hidden - sae.b_dec) @ sae.W_enc + sae.b_enc
    values, indices = (p * torch.tensor(scores, dtype=F64)).topk(6, dim=-1)
    latents = torch.zeros_like(p).scatter(-1, indices, p.gather(-1, indices) * (values > 0))
    assert int((latents != 0).sum(-1).max()) <= 6
    torch.testing.assert_close(out, latents @ sae.W_dec + sae.b_dec, rtol=1e-12, atol=1e-12)


def test_rows_of_a_batch_may_differ():
    """One row re-weighted, one edited, one left alone; each as it would be alone."""
    model = tiny_model(saes=[tiny_sae(dtype=F64, layer=1)], dtype=F64)
    ids = prompt(4, 6)
    scores = torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist()
    rows = [
        Steering([FeatureReweighting(0, scores, "swap")]),
        Steering([FeatureEdit(0, 3, "add", 2.0)]),
        None,
        Steering([FeatureReweighting(0, scores, "swap")], keep_error=False),
    ]
    with torch.no_grad():
        together = model(ids, steering=rows).logits
        for row, steering in enumerate(rows):
            alone = model(ids[row : row + 1], steering=steering or False).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-11, atol=1e-11)


def test_scores_must_be_numbers():
    with pytest.raises(ValueError, match=r"scores\[1\]=nan"):
        FeatureReweighting(0, (0.5, float("nan")))
    with pytest.raises(ValueError, match=r"64 latents. Received: 3"):
        tiny_model().prepare_steering(Steering([FeatureReweighting(0, (0.1, 0.2, 0.3))]))
