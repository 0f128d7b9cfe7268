"""Bad input is refused where it was typed, with the value that was received and what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sae_transformers import (
    FeatureEdit,
    FeatureReweighting,
    SaeForCausalLM,
    SaeForSequenceClassification,
    SaeModel,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Steering,
)
from tests.tiny import prompt, tiny_base, tiny_model, tiny_sae


@pytest.fixture(scope="module")
def model() -> SaeForCausalLM:
    return tiny_model(concepts={"good": 3})


def place(**where: Any) -> SparseAutoencoder:
    return tiny_sae(**where)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"layer": 3, "site": "resid_post"}, r"`layer` must be in \[0, 3\).*Received: layer=3"),
        ({"layer": 99, "site": "attn_out"}, r"Received: layer=99"),
        ({"hook": "model.layers.1.mpl"}, r"close ones: .*layers\.1\.mlp.*Received: hook='model\.layers\.1\.mpl'"),
        ({"hook": "model.layers.1.mlp.inputs"}, r"close ones: .*mlp.*hook='model\.layers\.1\.mlp\.inputs'"),
        ({"hook": "model.layers.9.mlp"}, r"close ones: model\.layers.*hook='model\.layers\.9\.mlp'"),
        ({"hook": ""}, r"hook=''"),
        ({"layer": 1, "hook_out": "model.layers.1.none", "apply_b_dec_to_input": False}, r"model\.layers\.1\.none"),
    ],
)  # fmt: skip
def test_a_place_that_the_base_does_not_have(where: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SaeForCausalLM.from_base(tiny_base(), [place(**where)])


def test_an_sae_without_a_place() -> None:
    with pytest.raises(ValueError, match=r"SAE 1 does not say where.*`sae.config.layer`"):
        SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=0), tiny_sae()])


@pytest.mark.parametrize("site", ["resid_mid", "mlp", "", ["mlp_out"], 3])
def test_an_unknown_site(site: Any) -> None:
    with pytest.raises(ValueError, match=r"'resid_post', 'mlp_out', .*'attn_heads'. Received: site="):
        SparseAutoencoderConfig(d_in=32, d_sae=64, layer=1, site=site)


@pytest.mark.parametrize("head", [SaeModel, SaeForCausalLM, SaeForSequenceClassification])
def test_a_width_that_does_not_fit_a_named_site_is_refused_when_built(head) -> None:
    with pytest.raises(ValueError, match=r"SAE 0 reads 48 values at layers.1.mlp_out.*width of 32"):
        head.from_base(_base_of(head), [tiny_sae(d_in=48, layer=1, site="mlp_out")])


def _base_of(head):
    base = tiny_base()
    if head is SaeModel:
        return base.model
    if head is SaeForCausalLM:
        return base
    return head.auto_model.from_config(base.config)


def test_a_width_that_does_not_fit_a_module_is_refused_at_the_first_forward() -> None:
    model = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(d_in=48, hook="model.layers.1.mlp")])
    edit = Steering([FeatureEdit(feature=1, op="add", value=1.0)])
    for options in ({"steering": edit}, {"output_features": True}, {"output_sae_inputs": True}):
        with pytest.raises(ValueError, match=r"SAE 0 reads 48 values.*gives 32"):
            model(prompt(), **options)
    assert model(prompt()).logits.shape == (2, 9, 99)  # the failed passes left nothing behind
    fits = SaeForCausalLM.from_base(tiny_base(), [tiny_sae(d_in=48, hook="model.layers.1.mlp.down_proj.input")])
    assert not torch.equal(fits(prompt(), steering=edit).logits, fits(prompt()).logits)


def test_a_decoder_that_does_not_fit_where_it_writes() -> None:
    sae = tiny_sae(
        d_out=48, hook="model.layers.1.mlp.input", hook_out="model.layers.1.mlp", apply_b_dec_to_input=False
    )
    edit = Steering([FeatureEdit(feature=1, op="add", value=1.0)])
    with pytest.raises(ValueError, match=r"SAE 0 writes 48 values.*32"):
        SaeForCausalLM.from_base(tiny_base(), [sae])(prompt(), steering=edit)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"feature": 1, "op": "push", "value": 1.0}, r"'at_least'.*Received: op='push'"),
        ({"feature": 1, "op": ["add"], "value": 1.0}, r"Received: op=\['add'\]"),
        ({"feature": 1, "unit": "percent", "value": 1.0}, r"'norm'. Received: unit='percent'"),
        ({"feature": 1, "unit": ["max"], "value": 1.0}, r"Received: unit=\['max'\]"),
        ({"feature": 1, "op": "add", "value": math.nan}, "finite number. Received: value=nan"),
        ({"feature": 1, "op": "add", "value": -math.inf}, "finite number. Received: value=-inf"),
        ({"feature": 1, "op": "add", "value": True}, "Received: value=True"),
        ({"feature": 1, "op": "add", "value": "2"}, "Received: value='2'"),
        ({"feature": 1, "op": "add"}, "Received: value=None"),
        ({"feature": 1, "op": "ablate", "value": 1.0}, "use 'set' for one. Received: value=1.0"),
        ({"feature": 1, "op": "scale", "value": 1.0, "unit": "max"}, "takes no unit. Received: unit='max'"),
        ({"feature": -1, "value": 1.0}, "feature=-1"),
        ({"feature": 1.0, "value": 1.0}, "feature=1.0"),
        ({"feature": True, "value": 1.0}, "feature=True"),
        ({"feature": None, "value": 1.0}, "feature=None"),
        ({"value": 1.0}, "feature=None"),
        ({"sae": -1, "feature": 1, "value": 1.0}, "sae=-1"),
        ({"sae": True, "feature": 1, "value": 1.0}, "sae=True"),
        ({"sae": "0", "feature": 1, "value": 1.0}, "sae='0'"),
        ({"feature": 1, "weight": 1.0}, r"\['weight'\] of FeatureEdit. Known: .*value"),
    ],
)
def test_a_bad_edit_as_object_and_as_json(fields: dict, told: str, model: SaeForCausalLM) -> None:
    if "weight" not in fields:
        with pytest.raises(ValueError, match=told):
            FeatureEdit(**fields)
    with pytest.raises(ValueError, match=told):
        Steering.from_dict({"edits": [fields]})
    with pytest.raises(ValueError, match=told):
        model(prompt(), steering={"edits": [fields]})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"positions": "last"}, r"'last_prompt'.*Received: positions='last'"),
        ({"positions": [(0, 1, 2)]}, r"positions=\[\(0, 1, 2\)\]"),
        ({"positions": [(0.5, None)]}, r"positions=\[\(0.5, None\)\]"),
        ({"positions": [(True, None)]}, r"positions=\[\(True, None\)\]"),
        ({"positions": 3}, "positions=3"),
        ({"positions": None}, "positions=None"),
        ({"reconstruct": (-1,)}, r"reconstruct=\(-1,\)"),
        ({"reconstruct": (True,)}, r"reconstruct=\(True,\)"),
        ({"reconstruct": 0}, "reconstruct=0"),
        ({"edits": [7]}, "Received: 7"),
        ({"edits": 7}, "edits=7|Received: 7"),
        ({"keep_error": "no"}, "keep_error='no'"),
        ({"balance": 1}, "balance=1"),
        ({"position": "all"}, r"\['position'\] of Steering. Known: .*positions"),
        ({"edits": [{"scores": [1.0, math.nan]}]}, r"scores\[1\]=nan"),
        ({"edits": [{"scores": [1.0, -2.0]}]}, r"scores\[1\]=-2.0"),
        ({"edits": [{"scores": []}]}, "scores"),
        ({"edits": [{"scores": ["a"]}]}, "'a'"),
        ({"edits": [{"scores": [1.0], "mode": "mix"}]}, "mode='mix'"),
        ({"edits": [{"scores": [1.0], "legacy": True}]}, "mode='swap'"),
        ({"edits": [{"scores": [1.0]}, {"scores": [2.0]}]}, r"SAEs \[0, 0\]"),
    ],
)
def test_a_bad_steering_as_object_and_as_json(fields: dict, told: str, model: SaeForCausalLM) -> None:
    if "position" not in fields:
        with pytest.raises((ValueError, TypeError), match=told):
            Steering(**fields)
    with pytest.raises((ValueError, TypeError), match=told):
        Steering.from_dict(fields)
    with pytest.raises((ValueError, TypeError), match=told):
        model.generate(prompt(), max_new_tokens=1, steering=fields)


@pytest.mark.parametrize("text", ["", "{", "[1", "null", "3", '"x"'])
def test_steering_as_text_that_is_no_json_object(text: str, model: SaeForCausalLM) -> None:
    with pytest.raises((ValueError, TypeError), match="JSON"):
        model(prompt(), steering=text)


NOT_THERE = {
    "sae": (FeatureEdit(1, 5, "add", 1.0), r"has 1 SAE\(s\), numbered from 0. Received: sae=1"),
    "feature": (FeatureEdit(0, 64, "add", 1.0), r"integer in \[0, 64\). Received: feature=64"),
    "concept": (FeatureEdit(0, "goood", "add", 1.0), r"it has 'good'. Received: feature='goood'"),
    "scores": (FeatureReweighting(0, (1.0, 2.0)), r"each of 64 latents. Received: 2"),
}


@pytest.mark.parametrize("kind", NOT_THERE)
def test_what_the_model_does_not_have(kind: str, model: SaeForCausalLM) -> None:
    edit, told = NOT_THERE[kind]
    steering = Steering([edit])
    before = model(prompt()).logits
    with pytest.raises(ValueError, match=told):
        model(prompt(), steering=steering)
    with pytest.raises(ValueError, match=told):
        model(prompt(), steering=[None, steering])
    with pytest.raises(ValueError, match=told):
        model.generate(prompt(), max_new_tokens=1, steering=steering)
    with pytest.raises(ValueError, match=told), model.steered(steering):
        pass
    with pytest.raises(ValueError, match=told):
        model.steering = steering
    with pytest.raises(ValueError, match=told):
        SaeForCausalLM.from_base(tiny_base(), [tiny_sae(layer=1, concepts={"good": 3})], steering=steering)
    with pytest.raises(ValueError, match=told):
        model.generate(prompt(), max_new_tokens=1, generation_config=_with_steering(model, steering))
    assert not model.steering and torch.equal(model(prompt()).logits, before)


def _with_steering(model: SaeForCausalLM, steering: Steering):
    config: Any = type(model.generation_config)(**model.generation_config.to_dict())
    config.sae_steering = steering.to_dict()
    return config


def test_steering_a_model_without_saes() -> None:
    model = SaeForCausalLM.from_base(tiny_base())
    edit = FeatureEdit(0, 1, "add", 1.0)
    for call in (
        lambda: model(prompt(), steering=edit),
        lambda: model.generate(prompt(), steering=edit, max_new_tokens=1),
        lambda: setattr(model, "steering", edit),
        lambda: model.steered(edit).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"no SAE to steer. Build it with `saes="):
            call()


def test_scars_hook(model: SaeForCausalLM) -> None:
    with pytest.raises(ValueError, match="feature=64"):
        model.hook.mod_features = 64
    with pytest.raises(AttributeError, match=r"mod_scaling.*Received: 'mod_scale'"):
        model.hook.mod_scale = 1.0
    model.hook.mod_features = 3
    with pytest.raises(ValueError, match="value=nan"):
        model.hook.mod_scaling = math.nan
    model.hook.mod_features = None
    assert not model.steering
    with pytest.raises(ValueError, match="no SAE|0 SAE"):
        SaeForCausalLM.from_base(tiny_base()).hook.mod_features = 3


def test_multiples_of_a_maximum_that_is_not_known() -> None:
    sae = tiny_sae(layer=1)
    sae.feature_max.zero_()
    model = SaeForCausalLM.from_base(tiny_base(), sae)
    with pytest.raises(ValueError, match=r"`model.saes\[0\].measure_feature_max\(hidden\)`, or give.*feature=7"):
        model(prompt(), steering=FeatureEdit(0, 7, "set", 2.0, unit="max"))


def test_a_list_of_the_wrong_length(model: SaeForCausalLM) -> None:
    edit = Steering([FeatureEdit(0, 1, "add", 1.0)])
    told = r"2 rows. Received: 3 steerings"
    with pytest.raises(ValueError, match=told):
        model(prompt(), steering=[edit, None, edit])
    with pytest.raises(ValueError, match=told):
        model.generate(prompt(), max_new_tokens=1, steering=[edit, None, edit])
    with pytest.raises(ValueError, match=told), model.steered([edit, None, edit]):
        model(prompt())


@pytest.mark.parametrize("steering", [3, object(), True])
def test_steering_that_is_none_of_its_forms(steering: Any, model: SaeForCausalLM) -> None:
    told = rf"Expected a Steering, its dict or its JSON, or edits. Received: {type(steering).__name__}"
    with pytest.raises(TypeError, match=told):
        model(prompt(), steering=steering)
    with pytest.raises(TypeError, match=told):
        model.generate(prompt(), max_new_tokens=1, steering=steering)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"features": [64]}, "feature=64"),
        ({"features": ["bad"]}, "it has 'good'. Received: feature='bad'"),
        ({"features": {1: [0]}}, "sae=1"),
        ({"features": {"0": [0]}}, "sae='0'"),
        ({"concept_targets": torch.zeros(2, 2)}, r"shape \(2, 9, 2\)"),
    ],
)
def test_a_bad_question_of_a_forward(options: dict, told: str) -> None:
    model = tiny_model(concepts={"good": 3})
    model.config.loss_weights["conditioning"] = 1.0
    with pytest.raises(ValueError, match=told):
        model(prompt(), **options)


def test_bad_detection(model: SaeForCausalLM) -> None:
    questions: tuple[tuple[dict[str, Any], str], ...] = (
        ({"feature": 64}, "feature=64"),
        ({"feature": "bad"}, "feature='bad'"),
        ({"feature": 1, "sae": 2}, "sae=2"),
        ({"feature": 1, "pooling": "median"}, "pooling='median'"),
    )
    for options, told in questions:
        with pytest.raises(ValueError, match=told):
            model.detect(prompt(), **options)


def test_misspelled_options(model: SaeForCausalLM) -> None:
    with pytest.raises((ValueError, TypeError), match="steerign"):
        model.generate(prompt(), max_new_tokens=1, steerign=Steering())
    with pytest.raises(ValueError, match="max_new_tokns"):
        model.generate(prompt(), max_new_tokns=1)
    with pytest.raises(TypeError, match=r"\['wieghts_scope'\].*Received: a loaded LlamaForCausalLM"):
        SaeForCausalLM.from_base(tiny_base(), tiny_sae(layer=1), wieghts_scope="full")


def test_a_misspelled_option_for_loading_a_base(tmp_path) -> None:
    tiny_base().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="wieghts_scope"):
        SaeForCausalLM.from_base(str(tmp_path), tiny_sae(layer=1), wieghts_scope="full")
    with pytest.raises(ValueError, match="weights_scope='all'"):
        SaeForCausalLM.from_base(str(tmp_path), tiny_sae(layer=1), weights_scope="all")


def test_more_active_latents_than_there_are() -> None:
    with pytest.raises(ValueError, match="`d_sae`=64. Received: k=65"):
        tiny_sae(k=65)


def test_a_transcoder_that_subtracts_an_output_bias_from_its_input() -> None:
    with pytest.raises(ValueError, match=r"transcoders set it False. Received: d_in=32, d_out=16"):
        SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64, d_out=16))


def test_reentrant_checkpointing() -> None:
    with pytest.raises(ValueError, match="Received: use_reentrant=True"):
        model = tiny_model()
        # transformers 5.2x gave it a second name and deprecated the first.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": True})
