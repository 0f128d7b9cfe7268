"""Cross-layer transcoders and crosscoders in a model: steered at every place they write to, as by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_transformers import (
    FeatureEdit,
    FeatureReweighting,
    Gate,
    SaeForCausalLM,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Steering,
    ce_loss_recovered,
    cross_layer_outputs,
    direction_sae,
    measure_reconstruction,
)
from sae_transformers.modeling.conversion.export import export
from sae_transformers.workflows.steering.export.constant_vectors import constant_vectors
from tests.tiny import LAYERS, WIDTH, tiny_base, tiny_sae

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
KINDS = ("transcoder", "crosscoder")


def layers_of(kind: str, **settings: Any) -> list[SparseAutoencoder]:
    """One SAE a layer, each of which writes from its layer on."""
    read, write = ("mlp_in", "mlp_out") if kind == "transcoder" else ("resid_post", "resid_post")
    saes = []
    for layer in range(LAYERS):
        places = [f"layers.{m}.{write}" for m in range(layer, LAYERS)]
        saes.append(
            tiny_sae(
                seed=layer, activation="jumprelu", apply_b_dec_to_input=False, d_out=WIDTH * len(places), layer=layer,
                site=read, dtype=torch.float64, hooks_out=places, **settings,
            )
        )  # fmt: skip
    return saes


def model_of(kind: str, **settings: Any) -> Any:
    model = SaeForCausalLM.from_base(tiny_base(dtype=torch.float64), saes=layers_of(kind, **settings))
    return model.double().eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@contextmanager
def by_hand(model: Any, change: Any) -> Iterator[Any]:
    """The base with `change(number, x, z) -> z'` done by plain hooks, in the order of the SAEs at each place."""
    base, pending, handles = model.unwrap(), {}, []
    kind = "transcoder" if model.config.sae_configs[0].site == "mlp_in" else "crosscoder"
    blocks = base.model.layers

    def read(number: int, x: Tensor) -> None:
        sae = model.saes[number]
        z = sae.encode(x)
        pending[number] = ((change(number, x, z) - z) @ sae.W_dec).chunk(LAYERS - number, -1)

    for m in range(LAYERS):
        if kind == "transcoder":
            handles.append(blocks[m].mlp.register_forward_pre_hook(lambda mod, args, m=m: read(m, args[0])))

        def write(mod: Any, args: Any, out: Any, m: int = m) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            for number in range(m + 1):
                if number == m and kind == "crosscoder":
                    read(m, hidden)
                hidden = hidden + pending[number][m - number]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handles.append((blocks[m].mlp if kind == "transcoder" else blocks[m]).register_forward_hook(write))
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()
        model.rewrap()


EDITS = {
    "add": (FeatureEdit(0, 5, "add", 1.5), lambda z, x, row: z + 1.5),
    "scale": (FeatureEdit(0, 5, "scale", -2.0), lambda z, x, row: -2.0 * z),
    "set": (FeatureEdit(0, 5, "set", 0.7), lambda z, x, row: torch.full_like(z, 0.7)),
    "ablate": (FeatureEdit(0, 5, "ablate"), lambda z, x, row: 0 * z),
    "direction": (FeatureEdit(0, 5, "direction", 2.0), lambda z, x, row: z + 2.0),
    # The norm of the change at all places together.
    "direction in norms": (
        FeatureEdit(0, 5, "direction", 0.3, unit="norm"),
        lambda z, x, row: z + 0.3 * x.norm(dim=-1) / row.norm(),
    ),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("number", range(LAYERS))
def test_an_edit_is_made_at_every_place(model: Any, name: str, number: int) -> None:
    edit, value = EDITS[name]
    edit = FeatureEdit(number, edit.feature, edit.op, edit.value, unit=edit.unit)

    def change(n: int, x: Tensor, z: Tensor) -> Tensor:
        z = z.clone()
        if n == number:
            z[..., 5] = value(z[..., 5], x, model.saes[n].W_dec[5])
        return z

    with torch.no_grad(), by_hand(model, change) as base:
        expected = base(input_ids=IDS).logits
    got = model(input_ids=IDS, steering=[edit]).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    if number < LAYERS - 1:
        assert not torch.allclose(got, model.lm(input_ids=IDS).logits, atol=1e-3)


def test_several_layers_at_once_and_rows_of_their_own(model: Any) -> None:
    rows = [Steering([FeatureEdit(0, 5, "add", 1.0), FeatureEdit(1, 9, "scale", 3.0)]), None]

    def change(n: int, x: Tensor, z: Tensor) -> Tensor:
        z = z.clone()
        if n == 0:
            z[0, :, 5] += 1.0
        if n == 1:
            z[0, :, 9] *= 3.0
        return z

    with torch.no_grad(), by_hand(model, change) as base:
        expected = base(input_ids=IDS).logits
    got = model(input_ids=IDS, steering=rows).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert torch.equal(got[1], model(input_ids=IDS).logits[1])


@pytest.mark.parametrize("positions", [None, "generated", "last_prompt"])
def test_generate_with_a_cache_is_without_one(model: Any, positions: Any) -> None:
    chosen = {} if positions is None else {"positions": positions}
    steering = Steering([FeatureEdit(0, 5, "add", 2.0), FeatureEdit(1, 3, "set", 1.0)], **chosen)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "steering": steering}
    fast, slow = (model.generate(IDS, use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(fast.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(slow.logits), rtol=0, atol=1e-10)


def test_idle_as_the_base_and_features_of_every_layer(model: Any) -> None:
    plain = model.lm(input_ids=IDS).logits
    found = model(input_ids=IDS, output_features=True, output_sae_inputs=True)
    assert torch.equal(found.logits, plain)
    for sae, features, x in zip(model.saes, found.sae_features, found.sae_inputs, strict=True):
        torch.testing.assert_close(features.to_dense(), sae.encode(x))
    assert len(model.top_features(IDS, sae=1, k=3).features[0]) == IDS.shape[1]
    assert model.detect(IDS, feature=5, sae=2).per_text.shape == (2,)


def test_gates_act_at_every_place(model: Any) -> None:
    z = model(input_ids=IDS, features=[5]).sae_features[0][..., 0]
    above = float(z.detach().mean())
    gate = Gate(feature=5, sae=0, above=above, over="token")
    steering = Steering([FeatureEdit(1, 9, "add", 2.0, when=gate)])

    def change(n: int, x: Tensor, latents: Tensor) -> Tensor:
        latents = latents.clone()
        if n == 0:
            opened.append(latents[..., 5] > above)
        if n == 1:
            latents[..., 9] += 2.0 * opened[0]
        return latents

    opened: list[Tensor] = []
    with torch.no_grad(), by_hand(model, change) as base:
        expected = base(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS, steering=steering).logits, expected, rtol=0, atol=1e-10)


def test_reweighting_acts_at_every_place(model: Any) -> None:
    weights = [2.0 if latent == 7 else 1.0 for latent in range(64)]

    def change(n: int, x: Tensor, latents: Tensor) -> Tensor:
        if n:
            return latents
        pre = model.saes[0].encode_pre_acts(x) * torch.tensor(weights, dtype=x.dtype)
        return pre * (pre > model.saes[0].threshold)

    with torch.no_grad(), by_hand(model, change) as base:
        expected = base(input_ids=IDS).logits
    got = model(input_ids=IDS, steering=Steering([FeatureReweighting(0, weights, mode="weight")])).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_gradients_of_latents_are_the_derivatives_by_add(model: Any) -> None:
    out = model(input_ids=IDS, output_features=True, features_require_grad="with_error")
    assert torch.equal(out.logits, model(input_ids=IDS).logits)
    logit = out.logits[0, -1, 11]
    features = out.sae_features[0]
    (gradient,) = torch.autograd.grad(logit, features.values)
    place = (features.values[0, 3] != 0).nonzero()[0, 0]
    latent, step = int(features.indices[0, 3, place]), 1e-2  # norms are in float32
    mask = torch.zeros(IDS.shape, dtype=torch.bool)
    mask[0, 3] = True
    up, down = (
        model(input_ids=IDS, steering=[FeatureEdit(0, latent, "add", s)], steering_mask=mask).logits[0, -1, 11]
        for s in (step, -step)
    )
    assert float(gradient[0, 3, place]) == pytest.approx(float((up - down).detach() / (2 * step)), rel=5e-3)


def test_outputs_are_sums_over_the_layers_that_write() -> None:
    saes = layers_of("transcoder")
    states = [torch.randn(4, WIDTH, dtype=torch.float64) for _ in saes]
    found = cross_layer_outputs(saes, states)
    assert list(found) == [f"layers.{m}.mlp_out" for m in range(LAYERS)]
    for m in range(LAYERS):
        expected = torch.zeros(4, WIDTH, dtype=torch.float64)
        for number, (sae, x) in enumerate(zip(saes, states, strict=True)):
            if number <= m:
                part = slice((m - number) * WIDTH, (m - number + 1) * WIDTH)
                expected += sae.encode(x) @ sae.W_dec[:, part] + sae.b_dec[part]
        torch.testing.assert_close(found[f"layers.{m}.mlp_out"], expected)
    with pytest.raises(ValueError, match="Received: 3 SAEs, 1 states"):
        cross_layer_outputs(saes, states[:1])
    with pytest.raises(ValueError, match="SAE 0, which writes layers.1.resid_post"):
        cross_layer_outputs([tiny_sae(layer=1)], states[:1])


def test_saved_and_loaded(tmp_path: Path) -> None:
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    model = SaeForCausalLM.from_base(str(tmp_path / "base"), saes=layers_of("transcoder"))
    edit = [FeatureEdit(0, 5, "add", 2.0)]
    expected = model(input_ids=IDS, steering=edit).logits
    model.save_pretrained(tmp_path / "model")
    again = SaeForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.sae_configs == model.config.sae_configs
    assert torch.equal(again(input_ids=IDS, steering=edit).logits, expected)
    assert SparseAutoencoder.from_pretrained(tmp_path / "model", sae_id="0").config.hooks_out


REFUSED = [
    (lambda m: m(input_ids=IDS, steering=Steering([FeatureEdit(0, 5, "ablate")], keep_error=False)), "not known"),
    (lambda m: m(input_ids=IDS, steering=[FeatureEdit(0, 5, "erase")]), "not known: each place that it writes to"),
    (lambda m: m(input_ids=IDS, steering=Steering(reconstruct=(2,))), "not known"),
    (lambda m: ce_loss_recovered(m, [{"input_ids": IDS}], saes=(2,)), "write where they read"),
    (lambda m: measure_reconstruction(m.saes[2], [torch.ones(3, WIDTH)]), "all layers"),
    (lambda m: export(m.saes[0], "nowhere", "saelens"), "cannot say this"),
    (lambda m: m(input_ids=IDS, output_features=True, features_require_grad=True), "no error to detach"),
    (lambda m: direction_sae(torch.ones(1, 3 * WIDTH), m.config.sae_configs[0]), "written to one place"),
]


@pytest.mark.parametrize(("use", "message"), REFUSED)
def test_uses_without_a_meaning_are_refused_by_name(model: Any, use: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(model)


def test_a_crosscoders_constant_edit_is_a_control_vector_of_several_layers() -> None:
    model = model_of("crosscoder")
    found = constant_vectors(model, Steering([FeatureEdit(1, 5, "direction", 2.0)]))
    assert list(found) == [1, 2]
    torch.testing.assert_close(torch.cat([found[1], found[2]]), 2.0 * model.saes[1].W_dec[5].detach().float())


def test_a_reconstruction_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="sum over all layers"):
        SaeForCausalLM.from_base(tiny_base(), saes=layers_of("crosscoder"), loss_weights={"reconstruction": 1.0})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hooks_out": ["layers.1.mlp_out"] * 2}, "must be different places"),
        ({"hook_out": "layers.1.mlp_out"}, "goes without `hook_out`"),
        ({"d_out": 65}, "multiple of the number of places"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=False"),
        ({"normalization": "constant_norm"}, "units of its input"),
    ],
)
def test_bad_configs(changed: dict[str, Any], message: str) -> None:
    places = ["layers.1.mlp_out", "layers.2.mlp_out"]
    good: dict[str, Any] = {"d_in": WIDTH, "d_sae": 8, "d_out": 2 * WIDTH, "layer": 1, "site": "mlp_in"}
    good |= {"hooks_out": places, "apply_b_dec_to_input": False}
    assert SparseAutoencoderConfig(**good).writes_at == places
    with pytest.raises(ValueError, match=message):
        SparseAutoencoderConfig(**{**good, **changed})


def test_widths_are_those_of_each_place() -> None:
    saes = layers_of("transcoder")
    saes[0] = tiny_sae(
        activation="jumprelu", apply_b_dec_to_input=False, d_out=3 * 16, layer=0, site="mlp_in",
        hooks_out=[f"layers.{m}.mlp_out" for m in range(LAYERS)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="writes 16 values at layers.0.mlp_out"):
        SaeForCausalLM.from_base(tiny_base(), saes=saes)
