"""Identities of SCAR (https://huggingface.co/papers/2411.07122), recomputed from its formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sae_transformers import FeatureEdit, SparseAutoencoder, SparseAutoencoderConfig, Steering
from sae_transformers.modeling.call_record import CallRequest
from sae_transformers.modeling.sae_steering import serve
from sae_transformers.modeling.steering_plan import SteeringPlan
from sae_transformers.training.sae.arguments import SaeLossArguments
from sae_transformers.training.sae.objective import SaeObjective
from tests.tiny import prompt, tiny_base, tiny_model, tiny_sae

F64 = torch.float64
SCAR = {"activation": "topk", "k": 8, "normalization": "layer_norm", "layer": 1, "site": "mlp_out"}
FEATURE = 5


def scar_sae(**settings) -> SparseAutoencoder:
    return tiny_sae(dtype=F64, **{**SCAR, **settings})


def scar_forward(sae: SparseAutoencoder, x: torch.Tensor, change=None):
    """(pre-activations, latents, reconstruction) as the published formulas have them."""
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    a = ((x - mean) / (std + 1e-5) - sae.b_dec) @ sae.W_enc + sae.b_enc
    values, indices = a.topk(sae.config.k or 0, dim=-1)
    z = torch.zeros_like(a).scatter(-1, indices, values.relu())
    changed = z if change is None else change(a, z.clone())
    return a, z, (changed @ sae.W_dec + sae.b_dec) * std + mean


def site_output(model, ids, **options) -> torch.Tensor:
    """What leaves the hooked MLP, after the library's hook."""
    seen = []
    handle = model.lm.model.layers[1].mlp.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(ids, **options)
    handle.remove()
    return seen[0]


@pytest.fixture
def scar():
    """A model in double precision, token ids, the MLP output without steering, and a latent that is active there."""
    model = tiny_model(saes=[scar_sae()], dtype=F64)
    ids = prompt(2, 12)
    with torch.no_grad():
        x = model(ids, output_sae_inputs=True).sae_inputs[0]
        latents = model.saes[0].encode(x)
    feature = int((latents > 0).sum((0, 1)).argmax())
    assert 0 < int((latents[..., feature] > 0).sum()) < ids.numel(), "the latent must be active on some tokens only"
    return model, ids, x, feature


def scale(feature, factor):
    return Steering([FeatureEdit(0, feature, "scale", factor)], keep_error=False)


def test_fact_1_no_features_no_change():
    base = tiny_base()
    ids = prompt()
    expected = base(ids).logits
    model = tiny_model(saes=[tiny_sae(**SCAR)])
    assert model.hook.mod_features is None
    assert torch.equal(model(ids).logits, expected)


def test_fact_2_factor_one_is_the_reconstruction(scar):
    model, ids, x, feature = scar
    out = site_output(model, ids, steering=scale(feature, 1.0))
    assert torch.equal(out, model.saes[0](x).reconstruction)
    assert (out - x).abs().max() > 0.1


@pytest.mark.parametrize("factor", [-100.0, -1.0, 0.0, 0.5, 50.0])
def test_fact_3_scaling_is_affine(scar, factor):
    model, ids, x, feature = scar
    sae = model.saes[0]
    change = site_output(model, ids, steering=scale(feature, factor)) - site_output(
        model, ids, steering=scale(feature, 1.0)
    )
    z = scar_forward(sae, x)[1][..., feature, None]
    std = x.std(-1, keepdim=True)
    torch.testing.assert_close(change, (factor - 1) * z * sae.W_dec[feature] * std, rtol=1e-12, atol=1e-12)


def test_fact_4_replacement_at_every_position(scar):
    model, ids, x, feature = scar
    sae = model.saes[0]
    replaced = Steering([FeatureEdit(0, feature, "set", 3.5)], keep_error=False)
    change = site_output(model, ids, steering=replaced) - site_output(model, ids, steering=scale(feature, 1.0))
    z = scar_forward(sae, x)[1][..., feature, None]
    expected = (3.5 - z) * sae.W_dec[feature] * x.std(-1, keepdim=True)
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)
    assert bool((z == 0).any())


def test_fact_5_inactive_latents_are_not_steered(scar):
    model, ids, x, feature = scar
    inactive = scar_forward(model.saes[0], x)[1][..., feature] == 0
    outs = [site_output(model, ids, steering=scale(feature, factor)) for factor in (-100.0, 0.0, 7.0)]
    for out in outs[1:]:
        assert torch.equal(out[inactive], outs[0][inactive])
        assert not torch.equal(out[~inactive], outs[0][~inactive])


@pytest.mark.parametrize("offset", [-1.0, 0.0, 1.0])
def test_fact_6_sparsity(offset):
    sae = scar_sae()
    x = torch.randn(200, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc += offset
        z, a = sae.encode(x), sae.encode_pre_acts(x)
    assert bool((z >= 0).all())
    assert bool(((z > 0).sum(-1) == (a > 0).sum(-1).clamp(max=sae.config.k)).all())


def test_fact_7_invariance_to_scale_and_shift():
    sae = scar_sae()
    x = torch.randn(50, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    moved = 3.0 * x + 1.7
    torch.testing.assert_close(sae.encode(moved), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sae(moved).reconstruction, 3.0 * sae(x).reconstruction + 1.7, rtol=1e-4, atol=1e-4
    )  # up to the eps, which is not scaled


def test_fact_8_a_perfect_code_keeps_the_asymmetric_eps():
    config = SparseAutoencoderConfig(d_in=6, d_sae=12, activation="topk", k=12, normalization="layer_norm")
    sae = SparseAutoencoder(config, dtype=F64)
    with torch.no_grad():  # z holds the positive and the negative part of x_n: W_dec z = x_n
        sae.W_enc.copy_(torch.cat([torch.eye(6), -torch.eye(6)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
        x = torch.randn(20, 6, dtype=F64, generator=torch.Generator().manual_seed(0)) * 1e-4
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    expected = mean + (x - mean) * std / (std + 1e-5)
    torch.testing.assert_close(sae(x).reconstruction, expected, rtol=1e-12, atol=1e-18)
    assert (expected - x).abs().max() > 1e-6


def scar_training(sae, x, labels=None, **settings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The training loss of hidden states (n_tokens, d_in) and labels (n_tokens,), and its terms of each token."""
    objective = SaeObjective([sae], SaeLossArguments(**settings)).train()
    batch = {sae.config.read_at: x} if labels is None else {sae.config.read_at: x, "labels": labels[:, None]}
    loss = objective(**batch)["loss"]
    return loss, objective.last_steps[0].terms


def test_fact_9_normalised_mse():
    sae = scar_sae(normalization="none")
    x = torch.randn(30, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = scar_training(sae, x)[1]["reconstruction"]
        torch.testing.assert_close(
            loss, (sae(x).reconstruction - x).square().mean(-1) / x.square().mean(-1), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(sae.losses(x, reduction="none")["reconstruction"], loss, rtol=1e-12, atol=0)
        sae.b_dec.zero_()
        # Scaled together, x and its reconstruction have the same loss.
        plain = scar_training(sae, x)[1]["reconstruction"]
        sae.b_enc.mul_(7.0)
        torch.testing.assert_close(scar_training(sae, 7.0 * x)[1]["reconstruction"], plain, rtol=1e-12, atol=0)
        sae.W_dec.zero_()
        assert torch.equal(scar_training(sae, x)[1]["reconstruction"], torch.ones(30, dtype=F64))


def concept_sae(**settings) -> SparseAutoencoder:
    return scar_sae(concepts={"toxicity": FEATURE}, **settings)


def tokens_and_labels(n: int = 40):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 32, dtype=F64, generator=generator), torch.randint(0, 2, (n,), generator=generator).to(F64)


def gradients(sae, loss) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}


def test_fact_10_conditioning_does_not_depend_on_the_selection():
    x, labels = tokens_and_labels()
    found = []
    for k in (64, 1):
        sae = concept_sae(k=k)
        with torch.no_grad():
            sae.b_enc[FEATURE] = -50.0  # never among the top 1
        found.append(gradients(sae, scar_training(sae, x, labels)[1]["conditioning"].mean()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    assert found[0]["W_enc"][:, FEATURE].abs().max() > 0


def test_fact_11_unknown_labels():
    x, labels = tokens_and_labels()
    sae = concept_sae()
    unknown = labels.clone()
    unknown[labels == 0] = -100
    legacy = [scar_training(sae, x, y, conditioning_legacy=True, pos_weight=2.0)[0] for y in (unknown, labels)]
    assert torch.equal(*legacy)
    # as intended they count for nothing
    terms = scar_training(sae, x, labels)[1]
    expected = (terms["reconstruction"] + (labels == 1) * terms["conditioning"]).mean()
    torch.testing.assert_close(scar_training(sae, x, unknown)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
def test_fact_12_scaling_of_positive_tokens(scaling):
    x, labels = tokens_and_labels()
    sae = concept_sae()
    a, _, reconstruction = scar_forward(sae, x)
    l2 = (reconstruction - x).square().mean(-1) / x.square().mean(-1)
    bce = F.binary_cross_entropy(a[:, FEATURE].sigmoid(), labels, reduction="none")
    w = torch.where(labels == 1, scaling, 1.0)
    legacy = gradients(sae, (w * (l2 + bce)).mean())
    a, _, reconstruction = scar_forward(sae, x)
    l2 = (reconstruction - x).square().mean(-1) / x.square().mean(-1)
    bce = F.binary_cross_entropy(a[:, FEATURE].sigmoid(), labels, reduction="none")
    intended = gradients(sae, (l2 + w * bce).mean())
    ours_legacy = gradients(sae, scar_training(sae, x, labels, pos_weight=scaling, conditioning_legacy=True)[0])
    ours = gradients(sae, scar_training(sae, x, labels, pos_weight=scaling)[0])
    for name in legacy:
        torch.testing.assert_close(ours_legacy[name], legacy[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours[name], intended[name], rtol=1e-9, atol=1e-12)
        same = torch.allclose(legacy[name], intended[name], rtol=1e-9, atol=1e-12)
        assert same == (scaling == 1.0)


def test_fact_12_zero_is_the_unconditioned_loss():
    x, labels = tokens_and_labels()
    sae = concept_sae()
    unconditioned = scar_training(scar_sae(), x)[0]
    for settings in ({"pos_weight": 0}, {"conditioning_weight": 0}, {"pos_weight": 0, "conditioning_legacy": True}):
        loss, terms = scar_training(sae, x, labels, **settings)
        assert torch.equal(loss, unconditioned) and set(terms) == {"reconstruction"}


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_the_weight_of_the_cross_entropy(weight):
    x, labels = tokens_and_labels()
    terms = scar_training(concept_sae(), x, labels, pos_weight=2.0)[1]
    expected = (terms["reconstruction"] + weight * terms["conditioning"]).mean()
    found = scar_training(concept_sae(), x, labels, pos_weight=2.0, conditioning_weight=weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_fact_13_one_call_a_token(scar):
    model, ids, _, feature = scar
    lengths = []
    handle = model.saes[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        steering=scale(feature, -1.0),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    handle.remove()
    assert lengths == [ids.shape[1], 1, 1, 1, 1]


def test_fact_14_left_padding(scar):
    model, ids, _, feature = scar
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids, steering=scale(feature, -20.0)).logits
        together = model(padded, attention_mask=mask, position_ids=positions, steering=scale(feature, -20.0)).logits[
            :, 4:
        ]
        without_mask = model(padded, steering=scale(feature, -20.0)).logits[:, 4:]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert (without_mask - alone).abs().max() > 1e-3


def test_fact_19_jumprelu_legacy_scaling():
    """With JumpReLU the original overwrites the latent by its raw pre-activation and scales its magnitude."""
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=4, d_sae=8, activation="jumprelu", apply_b_dec_to_input=False, layer=0, site="mlp_out"
        ),
        dtype=F64,
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc[0, 0] = 1.0
        sae.W_dec[0, 0] = 1.0
        sae.threshold.fill_(1.001)
    x = torch.zeros(1, 3, 4, dtype=F64)
    x[0, :, 0] = torch.tensor([2.0, -2.0, 0.0])
    steering = Steering([FeatureEdit(0, 0, "scale_magnitude", 3.0)], keep_error=False)
    request = CallRequest(1, 3, SteeringPlan([steering], [sae.config], [x]))
    result = sae(x, request, 0, task=serve)
    assert request.edit(x, result)[0, :, 0].tolist() == [6.0, 6.0, 0.0]


def test_fact_20_balance_keeps_the_sum(scar):
    model, ids, x, feature = scar
    sae = model.saes[0]
    balanced = Steering([FeatureEdit(0, feature, "scale", -3.0)], keep_error=False, balance=True)

    def change(a, z):
        shift = 4.0 * z[..., feature] / (z.shape[-1] - 1)
        factor = torch.ones(z.shape[-1], dtype=F64)
        factor[feature] = -3.0
        changed = z * factor + shift[..., None]
        changed[..., feature] -= shift
        torch.testing.assert_close(changed.sum(-1), z.sum(-1), rtol=1e-12, atol=1e-12)
        return changed

    expected = scar_forward(sae, x, change)[2]
    torch.testing.assert_close(site_output(model, ids, steering=balanced), expected, rtol=1e-11, atol=1e-11)


def test_facade_is_the_same_steering(scar):
    model, ids, _, feature = scar
    expected = site_output(model, ids, steering=scale(feature, -100.0))
    model.hook.mod_features = feature
    torch.testing.assert_close(site_output(model, ids), model.saes[0](scar[2]).reconstruction, rtol=0, atol=0)
    model.hook.mod_scaling = -100.0
    assert torch.equal(site_output(model, ids), expected)
    model.hook.mod_replacement = 2.0  # goes before scaling
    replaced = Steering([FeatureEdit(0, feature, "set", 2.0)], keep_error=False)
    assert torch.equal(site_output(model, ids), site_output(model, ids, steering=replaced))
    with pytest.raises(AttributeError, match="mod_scale"):
        model.hook.mod_scale = 1.0
    with pytest.raises(ValueError, match="999"):
        model.hook.mod_features = 999
    assert model.hook.mod_features == feature
    model.hook.mod_features = None
    assert torch.equal(site_output(model, ids), scar[2])


def test_facade_scales_a_list_of_features(scar):
    model, ids, x, feature = scar
    other = (feature + 1) % 64
    model.hook.mod_features = [feature, other]
    model.hook.mod_scaling = 3.0

    def change(a, z):
        z[..., [feature, other]] *= 3.0
        return z

    expected = scar_forward(model.saes[0], x, change)[2]
    torch.testing.assert_close(site_output(model, ids), expected, rtol=1e-11, atol=1e-11)


def test_facade_vector(scar):
    model, ids, x, _ = scar
    vector = torch.zeros(64)
    vector[[3, 9]] = torch.tensor([1.5, -2.0])
    model.hook.mod_features = 0
    model.hook.mod_vector = vector
    model.hook.mod_vec_factor = 2.0
    expected = scar_forward(model.saes[0], x, lambda a, z: z + 2.0 * vector.to(F64))[2]
    torch.testing.assert_close(site_output(model, ids), expected, rtol=1e-11, atol=1e-11)
