"""SaeConfig and SparseAutoencoderConfig: checked where they are made, and the same after a trip through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from sae_transformers import FeatureEdit, SaeConfig, SparseAutoencoderConfig, Steering
from sae_transformers.modeling import LossWeights
from sae_transformers.modeling.configuration_sae import AUTO_MAP
from tests.tiny import ARCHITECTURES, COMMON, prompt, tiny_model

ENTRY = {
    "d_in": 32, "d_sae": 64, "activation": "topk", "k": 8, "layer": 1, "site": "mlp_out",
    "concepts": {"good": 3}, "feature_names": {"3": "praise"}, "metadata": {"licence": "mit"},
}  # fmt: skip


def text_config(architecture: str = "llama"):
    return AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES[architecture]})


def sae_config(**fields: Any) -> Any:
    return SaeConfig(text_config=text_config(), saes=[ENTRY], **fields)


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert SparseAutoencoderConfig(d_in=32, d_sae=64, layer=1).to_dict() == {
        "d_in": 32, "d_sae": 64, "d_out": 32, "layer": 1, "site": "resid_post",
    }  # fmt: skip
    assert SparseAutoencoderConfig.from_dict(ENTRY).to_dict() == ENTRY | {"d_out": 32}


@pytest.mark.parametrize(
    "fields",
    [
        ENTRY,
        {"d_in": 4, "d_sae": 8, "d_out": 6, "hook": "model.layers.0.mlp.input", "hook_out": "model.layers.0.mlp",
         "apply_b_dec_to_input": False, "skip_connection": True},
        {"d_in": 4, "d_sae": 8, "normalization": "scalar", "input_scale": 0.5, "output_scale": 3.0, "layer": 0},
        {"d_in": 4, "d_sae": 8, "normalization": "layer_norm", "layer_norm_eps": 1e-4, "tied": True, "layer": 0},
        {"d_in": 4, "d_sae": 8, "activation": "batch_topk", "k": 2, "hook": "model.norm"},
    ],
)  # fmt: skip
def test_an_entry_comes_back_equal_through_json(fields: dict) -> None:
    entry = SparseAutoencoderConfig(**fields)
    assert SparseAutoencoderConfig.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"d_in": 0}, "d_in=0"),
        ({"d_in": True}, "d_in=True"),
        ({"d_sae": 64.0}, "d_sae=64.0"),
        ({"d_sae": "64"}, "d_sae='64'"),
        ({"d_out": -1}, "d_out=-1"),
        ({"activation": "softmax"}, "activation='softmax'"),
        ({"activation": ["relu"]}, r"activation=\['relu'\]"),
        ({"normalization": "batch_norm"}, "normalization='batch_norm'"),
        ({"k": None}, "k=None"),
        ({"k": 0}, "k=0"),
        ({"k": 65}, "`d_sae`=64. Received: k=65"),
        ({"k": True}, "k=True"),
        ({"site": "resid_mid"}, "'attn_heads'. Received: site='resid_mid'"),
        ({"layer": -1}, "layer=-1"),
        ({"layer": 1.5}, "layer=1.5"),
        ({"hook": "model.norm"}, "hook='model.norm', layer=1"),
        ({"hook": 3, "layer": None, "site": None}, "hook=3"),
        ({"input_scale": math.nan}, "input_scale=nan"),
        ({"input_scale": "1"}, "input_scale='1'"),
        ({"output_scale": 0}, "output_scale=0"),
        ({"layer_norm_eps": math.inf}, "layer_norm_eps=inf"),
        ({"tied": True, "activation": "gated"}, "activation='gated'"),
        ({"tied": True, "d_out": 16, "hook_out": "x"}, "d_out=16"),
        ({"d_out": 16}, "hook_out=None"),
        ({"d_out": 16, "hook_out": "x", "normalization": "layer_norm"}, "d_out=16"),
        ({"concepts": {"good": 64}}, r"concepts\['good'\]=64"),
        ({"concepts": {"good": True}}, r"concepts\['good'\]=True"),
        ({"concepts": ["good"]}, r"concepts=\['good'\]"),
        ({"feature_names": "praise"}, "feature_names='praise'"),
        ({"feature_names": {"rivers": "5"}}, r"as \{'5': 'rivers'\}.*Received: feature_names\['rivers'\]='5'"),
        ({"feature_names": {"64": "rivers"}}, r"\[0, 64\).*feature_names\['64'\]='rivers'"),
        ({"feature_names": {5: 7}}, r"feature_names\[5\]=7"),
        ({"metadata": 7}, "metadata=7"),
        ({"tied": "yes"}, "tied='yes'"),
    ],
)
def test_a_bad_value_is_refused_with_the_value_in_the_message(change: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        SparseAutoencoderConfig(**{**ENTRY, **change})


def test_names_of_features_work_as_those_of_concepts_do() -> None:
    names = {5: "rivers", "7": "good", "8": "twice", "9": "twice"}
    config = SparseAutoencoderConfig(**{**ENTRY, "feature_names": names})
    assert config.resolve_feature("rivers") == 5
    assert config.resolve_feature("good") == 3  # the concept of that name
    with pytest.raises(ValueError, match="Features 8, 9 of this SAE have that name.*Received: feature='twice'"):
        config.resolve_feature("twice")
    with pytest.raises(ValueError, match=r"it has 'rivers', \.\.\. \(3 in all\)\. Received: feature='river'"):
        config.resolve_feature("river")
    with pytest.raises(ValueError, match=r"it has 'good', 'rivers', 'twice'\. Received: feature='lake'"):
        config.resolve_feature("lake")
    assert SparseAutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = tiny_model(feature_names={"5": "rivers"})
    for given in ({"features": ["rivers"]}, {"features": [5]}):
        (found,) = model(prompt(), **given).sae_features
        assert torch.equal(found, model(prompt(), output_features=True).sae_features[0].to_dense()[..., [5]])
    edits = [[FeatureEdit(feature=one, op="direction", value=3.0)] for one in ("rivers", 5)]
    first, second = (model(prompt(), steering=one).logits for one in edits)
    assert torch.equal(first, second) and not torch.equal(first, model(prompt()).logits)


def test_an_unknown_field_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"\['d_hidden'\].*d_in, d_out, d_sae"):
        SparseAutoencoderConfig.from_dict({**ENTRY, "d_hidden": 64})
    with pytest.raises(ValueError, match="d_hidden"):
        SaeConfig(text_config=text_config(), saes=[{**ENTRY, "d_hidden": 64}])


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="d_sae"):
        SparseAutoencoderConfig.from_dict({"d_in": 32})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_the_config_comes_back_equal_from_a_folder(tmp_path, architecture: str) -> None:
    steering = Steering([FeatureEdit(0, "good", "add", 2.0)], positions=[(0, None), (-1, None)])
    config = SaeConfig(
        text_config=text_config(architecture), saes=[ENTRY, {"d_in": 32, "d_sae": 8, "layer": 0}],
        weights_scope="full", base_model_name_or_path="me/base", base_model_revision="a" * 40,
        steering=steering.to_dict(), loss_weights={"reconstruction": 0.5}, detach_hidden=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SaeConfig
    dropped = {"_name_or_path", "transformers_version", "_attn_implementation_autoset"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in dropped} == {
        k: v for k, v in config.to_dict().items() if k not in dropped
    }
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded.sae_configs == config.sae_configs
    assert Steering.coerce(loaded.steering) == steering
    assert loaded.auto_map == AUTO_MAP
    assert loaded.loss_weights == asdict(LossWeights(reconstruction=0.5))


def test_generate_finds_the_bases_values_in_the_text_config() -> None:
    config = sae_config()
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(decoder=True) is config.text_config
    assert config.get_text_config().vocab_size == 99
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings == config.text_config.tie_word_embeddings


def test_the_bases_quantisation_is_not_saved(tmp_path) -> None:
    config = sae_config()
    config.text_config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert config.text_config.quantization_config["load_in_4bit"]


def test_attention_and_experts_implementations_of_the_base_survive_wrapping() -> None:
    base = text_config("mixtral")
    base._attn_implementation = "eager"
    base._experts_implementation = "eager"
    config = SaeConfig(text_config=base, saes=[ENTRY])
    assert (base._attn_implementation, base._experts_implementation) == ("eager", "eager")
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"weights_scope": "all"}, "weights_scope='all'"),
        ({"saes": [{"d_in": 32, "d_sae": 64}]}, "'d_sae': 64"),
        ({"saes": [7]}, "saes.*7"),
        ({"saes": ENTRY}, "saes"),
        ({"text_config": {"hidden_size": 32}}, "model_type"),
        ({"text_config": {"model_type": "no_such_model"}}, "no_such_model"),
        ({"text_config": "llama"}, "text_config='llama'"),
        ({"loss_weights": {"lm": math.nan}}, "lm=nan"),
        ({"loss_weights": {"lm": True}}, "lm=True"),
        ({"loss_weights": {"l0": 1.0}}, "l0.*reconstruction"),
        ({"steering": {"edit": []}}, "edit"),
        ({"steering": {"edits": [{"feature": 1, "op": "push", "value": 1.0}]}}, "op='push'"),
        ({"steering": 5}, "5"),
        ({"dtype": "float33"}, "dtype='float33'"),
        ({"text_config": {"model_type": "llama", "dtype": "half-ish"}}, "dtype='half-ish'"),
    ],
)
def test_a_bad_model_config_is_refused(fields: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        SaeConfig(**{"text_config": text_config(), "saes": [ENTRY], **fields})


def test_steering_in_a_generation_config_comes_back_from_json(tmp_path) -> None:
    steering = Steering([FeatureEdit(0, 5, "set", 1.5)]).to_dict()
    GenerationConfig(sae_steering=steering, max_new_tokens=3).save_pretrained(tmp_path)
    loaded: Any = GenerationConfig.from_pretrained(tmp_path)
    assert loaded.sae_steering == steering and loaded.max_new_tokens == 3
