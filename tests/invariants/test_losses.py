"""The loss terms of a forward pass against hand computation, and where their gradients go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sae_transformers import SaeForCausalLM, SaeForSequenceClassification
from sae_transformers.modeling.activations import jump_relu
from tests.tiny import ARCHITECTURES, WIDTH, prompt, tiny_base, tiny_model, tiny_sae

F64 = torch.float64
TERMS = ("reconstruction", "sparsity", "conditioning")
CONCEPTS = {"anger": 3, "joy": 40}
ACTIVATIONS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 8},
    "topk-sigmoid": {"activation": "topk-sigmoid", "k": 8, "normalization": "layer_norm"},
    "gated": {"activation": "gated"},
    "identity": {"activation": "identity"},
    "jumprelu": {"activation": "jumprelu", "normalization": "constant_norm"},
    "tied": {"activation": "relu", "tied": True, "normalization": "scalar", "input_scale": 0.7},
}
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def loss_model(
    weights=None, dtype=F64, detach_hidden=True, weights_scope="sae", saes=None, base=None, **settings
) -> Any:
    if saes is None:
        place = {"layer": 1, "site": "resid_post"}
        saes = [tiny_sae(dtype=dtype, **{**place, "concepts": CONCEPTS, **settings})]
    return SaeForCausalLM.from_base(
        tiny_base(dtype=dtype) if base is None else base,
        saes=saes,
        loss_weights=weights or dict.fromkeys(TERMS, 1.0),
        detach_hidden=detach_hidden,
        weights_scope=weights_scope,
    )


def hidden_at(base, ids, path: str, side: str = "output", **inputs) -> torch.Tensor:
    """What a module of the bare base reads or gives."""
    seen = []
    module = base.get_submodule(path)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        base(input_ids=ids, **inputs)
    handle.remove()
    return seen[0]


def by_hand(sae, x, target=None, labels=None) -> dict[str, torch.Tensor]:
    """Each term per token, (...), from the SAE's public encode and decode."""
    target = x if target is None else target
    latents = sae.encode(x)
    missed = sae.decode(latents, x) - target
    terms = {
        "reconstruction": (missed**2).sum(-1) / (target**2).sum(-1),
        "sparsity": (latents.abs() * sae.W_dec.pow(2).sum(-1).sqrt()).sum(-1) / x.pow(2).sum(-1).sqrt(),
    }
    if labels is not None:
        p = torch.sigmoid(sae.encode_pre_acts(x)[..., list(sae.config.concepts.values())])
        known = labels != -100
        y = labels.clamp(min=0).to(p)
        bce = -(y * p.log() + (1 - y) * (1 - p).log())
        terms["conditioning"] = torch.where(known, bce, torch.zeros_like(bce)).sum(-1)
    return terms


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_terms_of_the_forward_pass_equal_hand_computation(name):
    weights = {"lm": 0.5, "reconstruction": 0.3, "sparsity": 0.07, "conditioning": 2.0}
    model = loss_model(weights, **ACTIVATIONS[name])
    ids = prompt(3, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    concepts = torch.tensor([[1.0, 0.0], [-100.0, 0.25], [0.0, -100.0]], dtype=F64)
    out = model(ids, attention_mask=mask, labels=labels, concept_targets=concepts)

    x = hidden_at(model.lm, ids, "model.layers.1", attention_mask=mask)
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    expected = by_hand(model.saes[0], x, labels=concepts[:, None, :].expand(-1, 7, -1))
    assert set(out.sae_losses) == set(TERMS)
    for term in TERMS:
        torch.testing.assert_close(out.sae_losses[term], expected[term][counted].mean(), **CLOSE)
    lm = model.lm(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(out.lm_loss, lm, rtol=0, atol=0)
    total = weights["lm"] * lm + sum(weights[t] * expected[t][counted].mean() for t in TERMS)
    torch.testing.assert_close(out.loss, total, **CLOSE)


def test_without_lm_labels_every_real_token_counts():
    model = loss_model()
    ids = prompt(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded left
    per_token = torch.randint(0, 2, (2, 6, 2), generator=torch.Generator().manual_seed(0)).double()
    per_token[1, 3] = -100
    out = model(ids, attention_mask=mask, concept_targets=per_token)
    x = hidden_at(model.lm, ids, "model.layers.1", attention_mask=mask)
    expected = by_hand(model.saes[0], x, labels=per_token)
    assert out.lm_loss is None
    for term in TERMS:
        torch.testing.assert_close(out.sae_losses[term], expected[term][mask.bool()].mean(), **CLOSE)
    torch.testing.assert_close(out.loss, sum(out.sae_losses.values()), **CLOSE)


def test_terms_are_means_over_saes_and_concepts_belong_to_those_that_have_them():
    settings = {"layer": 1, "site": "mlp_out", "dtype": F64}
    with_one = tiny_sae(1, concepts={"anger": 3}, **settings)
    without = tiny_sae(2, **{**settings, "layer": 0, "site": "resid_post"})
    with_two = tiny_sae(4, **{**settings, "layer": 2, "site": "resid_pre", "concepts": CONCEPTS})
    model = loss_model(saes=[with_one, without, with_two])
    ids = prompt(2, 5)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, -100.0, 1.0]], dtype=F64)
    out = model(ids, concept_targets=labels)
    tokens = labels[:, None, :].expand(-1, 5, -1)
    places = ("model.layers.1.mlp", "model.layers.0", "model.layers.1")
    parts = (tokens[..., :1], None, tokens[..., 1:])
    found = [
        by_hand(s, hidden_at(model.lm, ids, p), labels=y) for s, p, y in zip(model.saes, places, parts, strict=True)
    ]
    for term, count in (("reconstruction", 3), ("sparsity", 3), ("conditioning", 2)):
        expected = sum(f[term].mean() for f in found if term in f) / count
        torch.testing.assert_close(out.sae_losses[term], expected, **CLOSE)


@pytest.mark.parametrize("d_out", [WIDTH, 48])
def test_a_transcoder_is_compared_with_what_its_write_site_gives(d_out):
    hook, hook_out = ("model.layers.1.mlp.input", "model.layers.1.mlp.output")
    if d_out != WIDTH:
        hook, hook_out = "model.layers.1.mlp.input", "model.layers.1.mlp.up_proj.output"
    sae = tiny_sae(
        dtype=F64, activation="relu", d_out=d_out, hook=hook, hook_out=hook_out,
        apply_b_dec_to_input=False, skip_connection=True,
    )  # fmt: skip
    model = loss_model({"reconstruction": 1.0, "sparsity": 1.0}, saes=[sae])
    ids = prompt(2, 6)
    out = model(ids, labels=ids)
    x = hidden_at(model.lm, ids, "model.layers.1.mlp", "input")
    target = hidden_at(model.lm, ids, hook_out.removesuffix(".output"))
    assert target.shape[-1] == d_out
    expected = by_hand(sae, x, target)
    for term in ("reconstruction", "sparsity"):
        torch.testing.assert_close(out.sae_losses[term], expected[term][:, :-1].mean(), **CLOSE)


def test_zero_reconstruction_costs_exactly_one_and_a_perfect_one_nothing():
    model = loss_model({"reconstruction": 1.0})
    with torch.no_grad():
        model.saes[0].W_dec.zero_()
        model.saes[0].b_dec.zero_()
    ids = prompt(2, 6)
    assert model(ids, labels=ids).sae_losses["reconstruction"].item() == 1.0
    perfect = tiny_sae(dtype=F64, activation="identity", layer=1, d_sae=WIDTH)
    with torch.no_grad():
        perfect.W_enc.copy_(torch.eye(WIDTH))
        perfect.W_dec.copy_(torch.eye(WIDTH))
        perfect.b_enc.zero_()
    model = loss_model({"reconstruction": 1.0}, saes=[perfect])
    assert model(ids, labels=ids).sae_losses["reconstruction"].item() < 1e-28


@pytest.mark.parametrize("name", ["relu", "topk", "identity", "gated"])
def test_terms_do_not_depend_on_the_scale_of_the_hidden_state(name):
    sae = tiny_sae(dtype=F64, **ACTIVATIONS[name])
    with torch.no_grad():
        for parameter in ("b_enc", "b_dec", "b_gate", "b_mag"):
            if hasattr(sae, parameter):
                getattr(sae, parameter).zero_()
    x = torch.randn(20, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(0))
    small, large = sae.losses(x), sae.losses(1000 * x)
    for term in ("reconstruction", "sparsity"):
        torch.testing.assert_close(small[term], large[term], **CLOSE)


def test_a_concept_latent_outside_the_top_k_is_trained_by_its_pre_activation():
    latent, ids = 3, prompt(2, 6)
    model = loss_model({"conditioning": 1.0}, concepts={"anger": latent})
    sae = model.saes[0]
    with torch.no_grad():
        sae.b_enc[latent] = -40.0
    x = hidden_at(model.lm, ids, "model.layers.1")
    assert not sae.encode(x)[..., latent].any(), "never among the k largest"
    model(ids, concept_targets=torch.tensor([1.0, 0.0], dtype=F64)).loss.backward()
    error = torch.sigmoid(sae.encode_pre_acts(x)[..., latent]) - torch.tensor([[1.0], [0.0]], dtype=F64)
    expected = ((x - sae.b_dec) * error[..., None]).mean((0, 1)).detach()
    torch.testing.assert_close(sae.W_enc.grad[:, latent], expected, **CLOSE)
    torch.testing.assert_close(sae.b_enc.grad[latent], error.mean().detach(), **CLOSE)
    others = torch.arange(64) != latent
    assert not sae.W_enc.grad[:, others].any()
    assert sae.W_enc.grad[:, latent].abs().max() > 0.01


def test_unknown_labels_give_neither_loss_nor_gradient():
    ids = prompt(2, 6)
    values = []
    for labels in ([[1.0, -100.0], [0.0, -100.0]], [[1.0, -100.0], [-100.0, -100.0]]):
        model = loss_model({"conditioning": 1.0})
        loss = model(ids, concept_targets=torch.tensor(labels, dtype=F64)).loss
        loss.backward()
        grad = model.saes[0].W_enc.grad
        assert not grad[:, CONCEPTS["joy"]].any()
        values.append((loss.detach(), grad[:, CONCEPTS["anger"]]))
    model = loss_model({"conditioning": 1.0})
    x = hidden_at(model.lm, ids, "model.layers.1")
    pre = model.saes[0].encode_pre_acts(x)[..., CONCEPTS["anger"]]
    rows = F.binary_cross_entropy_with_logits(
        pre, torch.tensor([[1.0], [0.0]], dtype=F64).expand_as(pre), reduction="none"
    )
    torch.testing.assert_close(values[0][0], rows.mean(), **CLOSE)
    torch.testing.assert_close(values[1][0], rows[0].sum() / 12, **CLOSE)
    model = loss_model({"conditioning": 1.0})
    loss = model(ids, concept_targets=torch.full((2, 2), -100)).loss
    loss.backward()
    assert loss.item() == 0 and not model.saes[0].W_enc.grad.any()


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_the_base_gets_gradient_from_sae_terms_only_when_not_detached(detach, site):
    model = loss_model(detach_hidden=detach, weights_scope="full", site=site)
    ids = prompt(2, 6)
    concepts = torch.tensor([[1, 0], [0, 1]])
    model(ids, concept_targets=concepts).loss.backward()
    before = model.lm.model.layers[0].mlp.up_proj.weight.grad
    after = model.lm.model.layers[2].mlp.up_proj.weight.grad
    assert after is None or not after.any(), "layers after the SAE are no part of its losses"
    if detach:
        assert all(p.grad is None or not p.grad.any() for p in model.lm.parameters())
        return
    # The same gradient as of the terms written out over the base alone.
    reference = loss_model(detach_hidden=False, weights_scope="full", site=site)
    seen, path = [], "model.layers.1" if site == "resid_post" else "model.layers.1.mlp"
    module = reference.lm.get_submodule(path)
    module.register_forward_hook(lambda m, a, o: seen.append(o))
    reference.lm(input_ids=ids)
    terms = by_hand(reference.saes[0], seen[0], labels=concepts[:, None, :].expand(-1, 6, -1))
    torch.stack([t.mean() for t in terms.values()]).sum().backward()
    expected = reference.lm.model.layers[0].mlp.up_proj.weight.grad
    assert before.abs().max() > 1e-4
    torch.testing.assert_close(before, expected, **CLOSE)


def test_the_lm_loss_reaches_a_trainable_base_and_an_adapter_scope_freezes_it():
    full = loss_model(weights_scope="full")
    ids = prompt(2, 6)
    full(ids, labels=ids, concept_targets=torch.ones(2, 2)).loss.backward()
    plain = tiny_base(dtype=F64)
    plain(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in plain.named_parameters():  # detached SAE terms change nothing there
        torch.testing.assert_close(full.lm.get_parameter(name).grad, parameter.grad, **CLOSE)
    frozen = loss_model(weights_scope="sae")
    assert not any(p.requires_grad for p in frozen.lm.parameters())
    assert all(p.requires_grad for p in frozen.saes.parameters())
    frozen(ids, labels=ids, concept_targets=torch.ones(2, 2)).loss.backward()
    assert all(p.grad is None for p in frozen.lm.parameters())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_parameter_of_an_sae_gets_a_gradient(name):
    settings = dict(ACTIVATIONS[name])
    model = loss_model(**settings)
    if name == "jumprelu":  # put every threshold inside the kernel of some token
        ids = prompt(2, 6)
        x = hidden_at(model.lm, ids, "model.layers.1")
        with torch.no_grad():
            model.saes[0].threshold.copy_(model.saes[0].encode_pre_acts(x)[0, 0].abs() + 1e-5)
    ids = prompt(2, 6)
    model(ids, labels=ids, concept_targets=torch.ones(2, 2)).loss.backward()
    for parameter_name, parameter in model.saes[0].named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, parameter_name
        assert bool(torch.isfinite(parameter.grad).all()), parameter_name


@pytest.mark.parametrize("name", ["relu", "topk", "gated", "identity", "topk-sigmoid", "tied"])
def test_gradients_of_the_models_losses_equal_finite_differences(name):
    model = loss_model({"reconstruction": 1.0, "sparsity": 0.3, "conditioning": 0.7}, **ACTIVATIONS[name])
    ids, concepts = prompt(2, 5), torch.tensor([[1, 0], [-100, 1]])
    names = [n for n, _ in model.saes.named_parameters(prefix="saes")]

    def loss(*values):
        parameters = dict(zip(names, values, strict=True))
        options = {"concept_targets": concepts, "stop_at_last_sae": True}
        return torch.func.functional_call(model, parameters, (ids,), options).loss

    values = tuple(model.get_parameter(n).detach().clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


def test_jump_relu_backward_is_exact_where_it_is_differentiable():
    generator = torch.Generator().manual_seed(0)
    threshold = torch.rand(12, dtype=F64, generator=generator) + 0.1
    pre_acts = torch.randn(30, 12, dtype=F64, generator=generator) * 2
    pre_acts = torch.where((pre_acts - threshold).abs() < 0.05, pre_acts + 0.2, pre_acts).requires_grad_()
    # Away from the kernel the threshold has no gradient in either sense.
    inputs = (pre_acts, threshold.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, t: jump_relu(p, t, 1e-3), inputs, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("bandwidth", [1e-3, 0.5])
def test_jump_relu_threshold_gradient_is_the_papers_kernel_estimate(bandwidth):
    generator = torch.Generator().manual_seed(0)
    threshold = (torch.rand(12, dtype=F64, generator=generator) + 0.1).requires_grad_()
    offsets = bandwidth * torch.tensor([-2.0, -0.51, -0.49, -0.1, 0.1, 0.49, 0.51, 2.0], dtype=F64)
    pre_acts = (threshold.detach() + offsets[:, None]).requires_grad_()
    upstream = torch.randn(8, 12, dtype=F64, generator=generator)
    jump_relu(pre_acts, threshold, bandwidth).backward(upstream)
    # d/d theta JumpReLU = -(theta / eps) K((z - theta) / eps), K the rectangle of width 1 around 0 (equation 11).
    u = (pre_acts - threshold).detach() / bandwidth
    kernel = ((u > -0.5) & (u < 0.5)).double()
    expected = (-(threshold.detach() / bandwidth) * kernel * upstream).sum(0)
    torch.testing.assert_close(threshold.grad, expected, rtol=1e-12, atol=1e-12)
    active = (pre_acts.detach() > threshold.detach()) & (pre_acts.detach() > 0)
    torch.testing.assert_close(pre_acts.grad, torch.where(active, upstream, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_micro_batches_add_up_to_the_large_batch(architecture):
    sae = tiny_sae(layer=1, site="mlp_out", concepts=CONCEPTS)
    model = loss_model(saes=[sae], base=tiny_base(architecture), weights=dict.fromkeys(TERMS, 0.5))
    ids = prompt(4, 7)
    labels = ids.clone()
    labels[0, 4:] = labels[2, :5] = labels[3] = -100
    concepts = torch.tensor([[1, 0], [0, -100], [1, 1], [0, 1]])
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        whole = model(ids, labels=labels, concept_targets=concepts)
        parts = [
            model(ids[i : i + 1], labels=labels[i : i + 1], concept_targets=concepts[i : i + 1],
                  num_items_in_batch=count)
            for i in range(4)
        ]  # fmt: skip
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=2e-6, atol=2e-6)
    for term in TERMS:
        torch.testing.assert_close(sum(p.sae_losses[term] for p in parts), whole.sae_losses[term], rtol=2e-6, atol=0)
    torch.testing.assert_close(sum(p.lm_loss for p in parts), whole.lm_loss, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_micro_batches_of_a_classifier_add_up_too(problem):
    labels = {
        "single_label_classification": torch.tensor([0, 2, 1, 1]),
        "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]]),
        "regression": torch.tensor([[0.3, 1, 2], [0.1, 0, 0], [1, 2, 3], [-1, -2, 0]]),
    }[problem]
    base = _classifier_base(problem)
    sae = tiny_sae(layer=1, site="resid_post", concepts=CONCEPTS)
    model = SaeForSequenceClassification.from_base(base, [sae], loss_weights=dict.fromkeys(TERMS, 0.5))
    ids = prompt(4, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[2, 2:] = 0
    concepts = torch.tensor([[1, 0], [0, -100], [1, 1], [0, 1]])
    # What `Trainer` counts: labels that are not -100.
    count = labels.ne(-100).sum()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, labels=labels, concept_targets=concepts)
        rows = [slice(0, 1), slice(1, 3), slice(3, 4)]
        parts = [
            model(ids[r], attention_mask=mask[r], labels=labels[r], concept_targets=concepts[r],
                  num_items_in_batch=count)
            for r in rows
        ]  # fmt: skip
    torch.testing.assert_close(whole.lm_loss, base(input_ids=ids, attention_mask=mask, labels=labels).loss)
    for term in TERMS:
        torch.testing.assert_close(sum(p.sae_losses[term] for p in parts), whole.sae_losses[term], rtol=2e-6, atol=0)
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=2e-6, atol=2e-6)


def _classifier_base(problem: str) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.tiny import COMMON

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**COMMON, **ARCHITECTURES["llama"]}, num_labels=3, problem_type=problem)
    return AutoModelForSequenceClassification.from_config(config).eval()


def test_idle_losses_leave_the_base_bit_equal():
    model = tiny_model()
    ids = prompt()
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).loss, model.lm(input_ids=ids, labels=ids).loss)
        assert model(ids, labels=ids).sae_losses is None
