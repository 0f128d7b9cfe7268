"""Latents in the graph of the outputs: against plain torch and finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_transformers import FeatureEdit, SaeForCausalLM, Steering
from tests.tiny import prompt, tiny_base, tiny_sae

DOUBLE = torch.float64
KINDS = {
    "topk": {},
    "jumprelu": {"activation": "jumprelu", "normalization": "layer_norm"},
    "gated": {"activation": "gated", "normalization": "constant_norm"},
    "transcoder": {"activation": "relu", "skip_connection": True, "apply_b_dec_to_input": False},
}
IDS, D_SAE = prompt(2, 7), 64


def two_saes(kind: str, head=SaeForCausalLM):
    """A model with two SAEs of a kind: at both blocks' outputs, or in place of two MLPs."""
    saes = []
    for number in range(2):
        place = {"layer": number, "site": "resid_post"}
        if kind == "transcoder":
            place = {"layer": number, "site": "mlp_in", "hook_out": f"transformer.h.{number}.mlp"}
        saes.append(tiny_sae(seed=number + 1, dtype=DOUBLE, **KINDS[kind], **place))
    # GPT-2: bases with RMSNorm leave double precision inside.
    base = tiny_base("gpt2", dtype=DOUBLE, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = head.from_base(base, saes=saes).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return two_saes(request.param)


def score(out):
    """A number that all logits of the last tokens enter."""
    logits = out.logits[:, -1]
    return (logits[:, 5] - logits[:, 7]).sum() + logits.square().mean()


def dense(features, values):
    """Values of sparse features' places as (batch, seq, d_sae)."""
    return features._replace(values=values).to_dense()


def by_hand(model, detached: bool):
    """Gradients of `score` by (batch, seq, d_sae) latents of each SAE, from the base and hooks in plain torch."""
    leaves, handles, read = {}, [], {}
    for number, sae in enumerate(model.saes):
        layer = model.lm.transformer.h[number]

        def write(module, args, output, number=number, sae=sae):
            h = output[0] if isinstance(output, tuple) else output
            x = read.get(number, h)
            z = sae.encode(x)
            if detached:
                v = z if z.requires_grad else z.detach().requires_grad_()
                v = v * 1.0
                v.retain_grad()
                xh = (
                    sae.decode(v, x)
                    if not sae.config.skip_connection
                    else v @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T
                )
                new = h.detach() - xh.detach() + xh
            else:
                v = z.detach().requires_grad_()
                old = z.detach()
                scale = sae.normalize(x).scale
                change = (v - old) @ sae.W_dec
                new = h + (change if scale is None else change * scale.detach())
            leaves[number] = v
            return (new, *output[1:]) if isinstance(output, tuple) else new

        if sae.config.hook_out is None:
            handles.append(layer.register_forward_hook(write))
        else:
            keep = lambda module, args, number=number: read.update({number: args[0]})  # noqa: E731
            handles += [layer.mlp.register_forward_pre_hook(keep), layer.mlp.register_forward_hook(write)]
    out = model.unwrap()(input_ids=IDS)
    for handle in handles:
        handle.remove()
    model.rewrap()
    if detached:
        score(out).backward()
        return [leaves[n].grad for n in range(2)]
    return list(torch.autograd.grad(score(out), [leaves[0], leaves[1]]))


@pytest.mark.parametrize("error", [True, "with_error"])
def test_gradients_are_those_of_plain_torch(model, error):
    with torch.no_grad():
        base = model(IDS).logits
    out = model(IDS, output_features=True, features_require_grad=error)
    assert torch.equal(out.logits, base)
    values = [one.values for one in out.sae_features]
    found = torch.autograd.grad(score(out), values)
    for features, gradient, expected in zip(out.sae_features, found, by_hand(model, error is True), strict=True):
        active = features.to_dense() != 0
        ours = dense(features, gradient)
        assert gradient.abs().max() > 1e-3
        assert not gradient[features.values == 0].any()
        torch.testing.assert_close(ours[active], expected[active], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("error", [True, "with_error"])
def test_some_columns_have_the_gradients_of_all(model, error):
    out = model(IDS, output_features=True, features_require_grad=error)
    found = torch.autograd.grad(score(out), [one.values for one in out.sae_features])
    active = out.sae_features[0].indices[0, 3, out.sae_features[0].values[0, 3] != 0][:3].tolist()
    some = model(IDS, features={0: active, 1: [4, 9]}, features_require_grad=error)
    assert torch.equal(some.logits, out.logits)
    columns = torch.autograd.grad(score(some), list(some.sae_features))
    expected = dense(out.sae_features[0], found[0])[0, 3, active]
    torch.testing.assert_close(columns[0][0, 3], expected, rtol=1e-9, atol=1e-12)
    assert columns[1].abs().max() > 1e-4  # of latents that are not active too


def test_a_kept_errors_gradient_is_that_of_an_edit(model):
    """Finite differences by `FeatureEdit(op="add")` at one token: the base's own output, whatever SAEs are there."""
    out = model(IDS, output_features=True, features_require_grad="with_error")
    found = torch.autograd.grad(score(out), [one.values for one in out.sae_features])
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[1, 4] = True
    for number, (features, gradient) in enumerate(zip(out.sae_features, found, strict=True)):
        place = int(features.values[1, 4].argmax())
        feature, step, at = int(features.indices[1, 4, place]), 1e-5, []
        for value in (step, -step):
            edit = FeatureEdit(feature=feature, op="add", value=value, sae=number)
            with torch.no_grad():
                at.append(score(model(IDS, steering=Steering([edit]), steering_mask=mask)))
        slope = (at[0] - at[1]) / (2 * step)
        torch.testing.assert_close(gradient[1, 4, place], slope, rtol=1e-6, atol=1e-9)


def test_a_last_saes_gradient_is_the_same_with_its_error_detached(model):
    found = []
    for error in (True, "with_error"):
        out = model(IDS, features={1: None}, features_require_grad=error)
        found.append(torch.autograd.grad(score(out), out.sae_features[1].values)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("error", [True, "with_error"])
def test_later_latents_depend_on_earlier_ones(model, error):
    out = model(IDS, output_features=True, features_require_grad=error)
    later = out.sae_features[1].values[:, -1].sum()
    assert torch.autograd.grad(later, out.sae_features[0].values)[0].abs().max() > 1e-4


def test_with_the_error_kept_the_base_has_its_own_gradient():
    model = two_saes("jumprelu")
    model.lm.requires_grad_(True)
    names = [name for name, _ in model.lm.named_parameters()]
    own = torch.autograd.grad(score(model(IDS)), list(model.lm.parameters()), allow_unused=True)
    kept = model(IDS, output_features=True, features_require_grad="with_error")
    kept = torch.autograd.grad(score(kept), list(model.lm.parameters()), allow_unused=True)
    detached = model(IDS, output_features=True, features_require_grad=True)
    detached = torch.autograd.grad(score(detached), list(model.lm.parameters()), allow_unused=True)
    for name, one, same, other in zip(names, own, kept, detached, strict=True):
        torch.testing.assert_close(same, one, rtol=1e-12, atol=1e-15)
        if "h.0.mlp" in name:  # before both SAEs: through their latents alone
            assert (other - one).abs().max() > 1e-6


def test_a_loss_of_values_trains_what_is_before_them():
    model = two_saes("topk")
    weight = model.lm.transformer.h[0].mlp.c_proj.weight.requires_grad_(True)
    found = {}
    for error in (True, "with_error"):
        out = model(IDS, features={0: None}, features_require_grad=error)
        found[error] = torch.autograd.grad(out.sae_features[0].values.square().sum(), weight)[0]
    expected = torch.autograd.grad(model(IDS, features={0: None}).sae_features[0].values.square().sum(), weight)[0]
    torch.testing.assert_close(found[True], expected)
    torch.testing.assert_close(found["with_error"], expected)


def test_gradient_checkpointing_changes_nothing():
    model = two_saes("jumprelu")
    out = model(IDS, output_features=True, features_require_grad=True)
    expected = torch.autograd.grad(score(out), [one.values for one in out.sae_features])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = model(IDS, output_features=True, features_require_grad=True, use_cache=False)
    assert torch.equal(again.logits, out.logits)
    found = torch.autograd.grad(score(again), [one.values for one in again.sae_features])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_adding_constants_leaves_the_gradients_exact():
    """Steering that adds is done too, and the gradient is that of a change beside it."""
    model = two_saes("topk")
    steering = Steering([FeatureEdit(feature=3, op="add", value=2.0)])
    out = model(IDS, features={0: None}, features_require_grad=True, steering=steering)
    assert torch.equal(out.logits, model(IDS, steering=steering).logits)
    gradient = torch.autograd.grad(score(out), out.sae_features[0].values)[0]
    place = torch.zeros_like(gradient)
    place[0, 2, 0] = 1e-5
    at = []
    for sign in (1, -1):
        with torch.no_grad():
            moved = model(IDS, edit_features=lambda f, sign=sign: f.values + sign * place, steering=steering)
        at.append(score(moved))
    torch.testing.assert_close(gradient[0, 2, 0], (at[0] - at[1]) / 2e-5, rtol=1e-6, atol=1e-9)


class Made(TorchDispatchMode):
    """The operations that run, and how many of their results have a place for every latent of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.wide = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        results = found if isinstance(found, (tuple, list)) else [found]
        wide = [one for one in results if isinstance(one, torch.Tensor) and one.shape[-1:] == (D_SAE,)]
        self.wide += sum(one.numel() >= IDS.numel() * D_SAE and one.is_floating_point() for one in wide)
        return found


def test_off_it_costs_nothing():
    model = two_saes("topk")
    with Made() as plain:
        expected = model.lm(input_ids=IDS).logits
    with Made() as ours:
        found = model(IDS, features_require_grad=False, edit_features=None).logits
    assert torch.equal(found, expected)
    assert ours.names == plain.names


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("error", [True, "with_error"])
def test_no_dense_code_is_made_but_the_saes_own(kind, error):
    """Of a top-k SAE the pre-activations alone, as without a gradient; and the backward pass makes none."""
    model = two_saes(kind)
    with Made() as plain:
        model(IDS, features={1: None})
    with Made() as graph:
        out = model(IDS, features={1: None}, features_require_grad=error)
    with Made() as backward:
        torch.autograd.grad(score(out), out.sae_features[1].values)
    assert graph.wide <= plain.wide > 0
    assert backward.wide == 0


# -- functions of features -------------------------------------------------------------------------------------------


def test_a_function_that_zeroes_a_latent_is_an_edit_that_ablates_it(model):
    feature = [int(f.indices[0, 3, f.values[0, 3].argmax()]) for f in model(IDS, output_features=True).sae_features]

    def without(wanted):
        return lambda f: f.values.masked_fill(f.indices == wanted, 0.0)

    with torch.no_grad():
        found = model(
            IDS, edit_features={n: without(wanted) for n, wanted in enumerate(feature)}, output_features=True
        )
        edits = [FeatureEdit(feature=wanted, op="scale", value=0.0, sae=n) for n, wanted in enumerate(feature)]
        expected = model(IDS, steering=Steering(edits), output_features=True)
        base = model(IDS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-11)
    assert (found.logits - base.logits).abs().max() > 1e-4
    for one, other in zip(found.sae_features, expected.sae_features, strict=True):  # both report what is before
        torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-9, atol=1e-11)


def test_a_function_may_make_leaves(model):
    weight = torch.ones((), dtype=DOUBLE, requires_grad=True)
    out = model(IDS, edit_features=lambda f: f.values * weight)
    grad = model(IDS, features={0: None}, features_require_grad="with_error")
    values = grad.sae_features[0].values
    expected = (torch.autograd.grad(score(grad), values)[0] * values).sum()
    torch.testing.assert_close(torch.autograd.grad(score(out), weight)[0], expected, rtol=1e-9, atol=1e-12)


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "no features": ({"features_require_grad": True}, "`output_features=True` or `features="),
    "another word": ({"features_require_grad": "yes", "output_features": True}, "features_require_grad='yes'"),
    "pre-activations": (
        {"features_require_grad": True, "features": [1], "pre_activations": True},
        "pre_activations=True",
    ),
    "both": ({"features_require_grad": True, "features": [1], "edit_features": lambda f: f.values}, "Received: both"),
    "an SAE that is not there": ({"edit_features": {2: lambda f: f.values}}, "has 2 SAE"),
    "a steering that reads": (
        {
            "features_require_grad": True,
            "output_features": True,
            "steering": Steering([FeatureEdit(feature=3, op="scale", value=0.0, sae=1)]),
        },
        "reads latents of SAE 1",
    ),
    "values of another shape": ({"edit_features": lambda f: f.values[:1]}, "must return their new values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        two_saes("jumprelu")(IDS, **options)


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="Received: int"):
        two_saes("topk")(IDS, edit_features=3)


def test_without_gradients_it_is_refused():
    model = two_saes("topk")
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are off"):
        model(IDS, output_features=True, features_require_grad=True)
    with pytest.raises(TypeError, match="reports no features"):
        model.generate(IDS, features_require_grad=True)
