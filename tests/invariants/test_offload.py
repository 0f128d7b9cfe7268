"""SAEs whose parameters accelerate keeps elsewhere: outputs must be exactly those of the model in memory.

An SAE that reads its parameters outside the forward of its own module sees placeholders, and nothing fails.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

from sae_transformers import FeatureEdit, FeatureReweighting, SaeForCausalLM, Steering
from tests.tiny import WIDTH, prompt, tiny_base, tiny_sae

# Releases before 5.13 or so warn of any offloaded model, a plain one too: its parameters are on "meta".
pytestmark = pytest.mark.filterwarnings(r"ignore:You are calling .generate\(\) with the `input_ids`:UserWarning")

EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}
# Tensors that come from a file lie at other addresses, where the CPU's matrix products round in another order.
LOADED: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-6}
SAES = {
    "topk": {"activation": "topk", "k": 8, "normalization": "layer_norm"},
    "jumprelu": {"activation": "jumprelu"},
    "batch_topk": {"activation": "batch_topk", "k": 8, "normalization": "constant_norm"},
    "gated": {"activation": "gated"},
    "tied": {"activation": "relu", "tied": True},
}
STEERINGS = {
    "ops": Steering(
        [
            FeatureEdit(feature="anger", op="add", value=6.0),
            FeatureEdit(feature=7, op="scale", value=-2.0),
            FeatureEdit(feature=8, op="at_least", value=0.5, unit="max"),
            FeatureEdit(feature=9, op="direction", value=0.3, unit="norm"),
        ]
    ),
    "direction": Steering([FeatureEdit(feature=9, op="direction", value=4.0)]),
    "replace": Steering([FeatureEdit(feature=7, op="set", value=2.0)], keep_error=False),
    "swap": Steering([FeatureReweighting(scores=[float(i % 3) for i in range(64)])]),
}


def model_with(name: str, weights_scope: str = "sae", base=None) -> Any:
    sae = tiny_sae(layer=1, site="mlp_out", concepts={"anger": 3}, **SAES[name])
    other = tiny_sae(2, layer=2, site="resid_pre", activation="relu")
    model = SaeForCausalLM.from_base(
        tiny_base() if base is None else base, [sae, other], weights_scope=weights_scope,
        loss_weights={"reconstruction": 1.0, "sparsity": 1.0, "conditioning": 1.0},
    )  # fmt: skip
    return model.eval()


def offloaded(model: Any, how: str, folder) -> Any:
    model = copy.deepcopy(model)
    if how == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        disk_offload(model, str(folder / "all"), execution_device=torch.device("cpu"))
    elif how == "cpu_offload of the SAEs":
        cpu_offload(model.saes, execution_device=torch.device("cpu"))
    else:
        device_map: dict[str, Any] = {"lm": "cpu", "saes.0": "disk", "saes.1": "cpu"}
        model = dispatch_model(model, device_map, main_device=torch.device("cpu"), offload_dir=str(folder / "some"))
    assert next(model.saes[0].parameters()).device.type == "meta", "the SAE is elsewhere between calls"
    return model


HOW = ["cpu_offload", "disk_offload", "cpu_offload of the SAEs", "dispatch_model"]


def outcome(model, steering=None) -> list[torch.Tensor]:
    ids = prompt()
    with torch.no_grad():
        out = model(
            ids, steering=steering, output_features=True, output_sae_inputs=True, labels=ids,
            concept_targets=torch.tensor([1, 0]), output_hidden_states=True,
        )  # fmt: skip
    found = [out.logits, out.loss, *out.hidden_states, *out.sae_losses.values(), *out.sae_inputs]
    return [*found, *(f.to_dense() for f in out.sae_features)]


def assert_all_equal(found, expected, tolerance=None) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **(tolerance or EXACT))


# Every way with one SAE and every SAE one way; the others with the slow tests.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if name == next(iter(SAES)) or how == HOW[1] else pytest.mark.slow)
        for name in SAES
        for how in HOW
    ],
)
def test_forward_and_generate_are_exact(tmp_path, name, how):
    model = model_with(name)
    moved = offloaded(model, how, tmp_path)
    assert_all_equal(outcome(moved), outcome(model))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    for kind, steering in STEERINGS.items():
        if kind == "swap" and name == "gated":  # refused: it has two pre-activations per latent
            continue
        expected = outcome(model, steering)
        assert not torch.equal(expected[0], outcome(model)[0])
        assert_all_equal(outcome(moved, steering), expected)
        with moved.steered(steering):
            assert_all_equal(outcome(moved), expected)
        scores = [m.generate(prompt(), steering=steering, **options).scores for m in (moved, model)]
        assert_all_equal(*scores)
    # Whole texts, one feature, nothing after the SAE.
    for feature in ("anger", 5):
        assert_all_equal(
            moved.detect(prompt(), feature=feature, pre_activations=True, skip_first=0),
            model.detect(prompt(), feature=feature, pre_activations=True, skip_first=0),
        )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SAES)
def test_public_methods_of_an_offloaded_sae(tmp_path, name, how):
    model = model_with(name)
    moved = offloaded(model, how, tmp_path)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([3, 7, 40])
    here, there = model.saes[0], moved.saes[0]
    with torch.no_grad():
        z = here.encode(x)
        assert z.any()
        pairs = [
            (there.encode(x), z),
            (there.decode(z), here.decode(z)),
            (there.decode(z, x), here.decode(z, x)),
            (there.encode_pre_acts(x), here.encode_pre_acts(x)),
            (there.encode_pre_acts(x, columns), here.encode_pre_acts(x, columns)),
            (there.encode_selected(x, columns), here.encode_selected(x, columns)),
            (there.encode_sparse(x).to_dense(), here.encode_sparse(x).to_dense()),
            (there(x).reconstruction, here(x).reconstruction),
            (there(x).latents, here(x).latents),
            *zip(there.losses(x[0]).values(), here.losses(x[0]).values(), strict=True),
        ]
    assert_all_equal(*zip(*pairs, strict=True))


@pytest.mark.parametrize("weights_scope", ["sae", "full"])
def test_loading_with_an_offload_folder(tmp_path, weights_scope):
    tiny_base().save_pretrained(tmp_path / "base")
    model = model_with("topk", weights_scope, str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "own")
    blocks = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    device_map = {**blocks, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    if weights_scope == "full":
        device_map = {f"lm.{k}": v for k, v in device_map.items()} | {"saes.0": "disk", "saes.1": "cpu"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "own", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.lm.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    if weights_scope == "full":
        assert loaded.saes[0].W_dec.device.type == "meta"
    assert_all_equal(outcome(loaded), outcome(model), LOADED)
    for steering in STEERINGS.values():
        assert_all_equal(outcome(loaded, steering), outcome(model, steering), LOADED)


def test_max_unit_of_an_offloaded_sae_uses_its_own_maxima(tmp_path):
    steering = Steering([FeatureEdit(feature=7, op="set", value=1.5, unit="max")])
    model = model_with("jumprelu")
    absolute = Steering([FeatureEdit(feature=7, op="set", value=1.5 * model.saes[0].feature_max[7].item())])
    for how in HOW:
        moved = offloaded(model, how, tmp_path)
        found = outcome(moved, steering)
        assert_all_equal(found, outcome(model, steering))
        torch.testing.assert_close(found[0], outcome(model, absolute)[0], rtol=1e-5, atol=1e-5)
