"""Which models vLLM's config hook refuses by name, before anything is loaded; vLLM itself is not needed for that."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from sae_transformers import SaeConfig
from sae_transformers.vllm.config import SaeModelConfig
from tests.tiny import WIDTH, tiny_base, tiny_sae


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("bamba", "recurrent layers"),
        ("mamba", "recurrent layers"),
        ("qwen3_next", "recurrent layers"),
        ("t5gemma", "encoder-decoder"),
        ("llava", "reads images"),
    ],
)
def test_bases_of_other_kinds(family, told):
    model_config = SimpleNamespace(hf_config=SaeConfig(text_config=AutoConfig.for_model(family)))
    with pytest.raises(ValueError, match=told):
        SaeModelConfig.verify_and_update_model_config(model_config)


def of_several_places() -> SaeConfig:
    """A layer of a cross-layer transcoder, as `load_saes` reads it."""
    places = ["model.layers.1.mlp", "model.layers.2.mlp"]
    layer = tiny_sae(
        hook="model.layers.1.mlp.input", hooks_out=places, d_out=2 * WIDTH, activation="relu",
        apply_b_dec_to_input=False,
    )  # fmt: skip
    return SaeConfig(text_config=tiny_base().config, saes=[layer.config.to_dict()])


def test_layers_of_a_cross_layer_transcoder() -> None:
    """What steers one would have to reach places that vLLM computes in other steps."""
    model_config: Any = SimpleNamespace(hf_config=of_several_places())
    with pytest.raises(ValueError, match="do not support layers of a cross-layer transcoder or crosscoder") as refused:
        SaeModelConfig.verify_and_update_model_config(model_config)
    assert "Received: an SAE that writes model.layers.1.mlp, model.layers.2.mlp." in str(refused.value)
    assert "Instead: `sae-transformers serve` without it" in str(refused.value)


def test_a_transcoder_of_one_place_and_an_sae_pass() -> None:
    coder = tiny_sae(
        hook="model.layers.1.mlp.input", hook_out="model.layers.1.mlp", activation="relu", apply_b_dec_to_input=False
    )
    saes = [coder.config.to_dict(), tiny_sae(layer=1).config.to_dict()]
    model_config: Any = SimpleNamespace(hf_config=SaeConfig(text_config=tiny_base().config, saes=saes))
    SaeModelConfig.verify_and_update_model_config(model_config)
