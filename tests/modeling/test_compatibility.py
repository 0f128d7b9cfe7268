"""SAEs that belong to another base are refused before they give wrong numbers."""

import pytest
import torch

from sae_transformers import SaeForCausalLM
from sae_transformers.modeling.compatibility import same_model
from tests.tiny import prompt, tiny_base, tiny_sae


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("google/gemma-2-2b", "gemma-2-2b", True),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("/cache/models--google--gemma-2-2b/snapshots/0f3c", "google/gemma-2-2b", True),
        ("google/gemma-2-2b", "google/gemma-2-2b-it", False),
        ("google/gemma-2-2b", "google/gemma-2-9b", False),
    ],
)
def test_names_of_the_same_model(one, other, same):
    assert same_model(one, other) is same and same_model(other, one) is same


def test_a_base_of_another_name_is_refused_unless_forced():
    base, sae = tiny_base(), tiny_sae(layer=1, metadata={"base_model": "google/gemma-2-2b"})
    assert not base.name_or_path  # a base that says nothing is not doubted
    assert SaeForCausalLM.from_base(base, saes=[sae]) is not None
    base = tiny_base()
    base.name_or_path = "google/gemma-2-2b-it"
    with pytest.raises(ValueError, match=r"made for 'google/gemma-2-2b'.*instruction-tuned \(google/gemma-2-2b-it\)"):
        SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=0), sae])
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=0), sae], force=True)
    assert torch.isfinite(model(prompt()).logits).all()


def test_a_base_given_by_name_is_refused_before_it_is_loaded():
    sae = tiny_sae(layer=1, metadata={"base_model": "google/gemma-2-2b"})
    with pytest.raises(ValueError, match="Received: the base 'nobody/no-such-model'"):
        SaeForCausalLM.from_base("nobody/no-such-model", saes=[sae])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_sae_inside_the_mlp_has_the_width_of_its_linear_map(architecture):
    base = tiny_base(architecture)
    inner = {"llama": 48, "gpt2": 128}[architecture]
    sae = tiny_sae(d_in=inner, layer=1, site="mlp_act")
    model = SaeForCausalLM.from_base(base, saes=[sae])
    output = model(prompt(), output_features=True)
    assert output.sae_features[0].indices.shape[:2] == (2, 9)
    with pytest.raises(ValueError, match=rf"reads 31 values at layers\.1\.mlp_act.*a width of {inner}"):
        SaeForCausalLM.from_base(tiny_base(architecture), saes=[tiny_sae(d_in=31, layer=1, site="mlp_act")])
