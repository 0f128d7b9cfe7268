"""The tiny bases themselves: every family is built and runs, or is on the list of those that cannot be."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.tiny_bases import (
    CAUSAL,
    IMAGE_TEXT,
    NEEDS_IMAGE,
    NO_IMAGE_INPUTS,
    base_facts,
    causal_families,
    families,
    image_text_families,
    tiny_base,
    tiny_config,
    tiny_inputs,
    why_not_tiny,
)

FEW = ("llama", "gemma3_text", "bert", "gpt2", "mamba2", "qwen3_next", "mixtral")
BOTH = [(CAUSAL, name) for name in causal_families()] + [(IMAGE_TEXT, name) for name in image_text_families()]
WARNINGS = pytest.mark.filterwarnings("default")  # the families' own, which are not ours


def _extends_text(base, with_image: bool | None) -> bool:
    """Whether the base gives finite logits for a text and `generate` appends two tokens to it."""
    inputs = tiny_inputs(base, with_image=with_image)
    with torch.no_grad():
        finite = bool(torch.isfinite(base(**inputs).logits).all())
        found = base.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    ids = inputs["input_ids"]
    if base.config.model_type == "blip":  # its `generate` puts bos in the place of the first word and drops the last
        return finite and found.shape[1] == ids.shape[1] + 1
    return finite and found.shape[1] == ids.shape[1] + 2 and torch.equal(found[:, : ids.shape[1]], ids)


@WARNINGS
@pytest.mark.parametrize("model_type", FEW)
def test_a_few_families_run(model_type):
    base = tiny_base(model_type)

    text = base.config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers) == (32, 4)
    assert sum(parameter.numel() for parameter in base.parameters()) < 400_000
    assert not base.training
    assert _extends_text(base, with_image=False)


@WARNINGS
def test_same_seed_same_base():
    first, second, other = tiny_base("qwen3"), tiny_base("qwen3"), tiny_base("qwen3", seed=1)
    inputs = tiny_inputs(first)

    logits = first(**inputs).logits
    assert torch.equal(logits, second(**inputs).logits)
    assert not torch.allclose(logits, other(**inputs).logits, atol=0.1)


@WARNINGS
def test_an_image_changes_the_answer():
    base = tiny_base("qwen2_5_vl", IMAGE_TEXT)
    inputs = tiny_inputs(base, with_image=True)

    darker = {**inputs, "pixel_values": inputs["pixel_values"] * 0.3}
    assert not torch.allclose(base(**inputs).logits, base(**darker).logits, atol=1e-3)


@WARNINGS
def test_all_identities_hold_for_llama():
    assert base_facts(tiny_base("llama")).failing() == {}


@WARNINGS
def test_facts_say_what_was_seen_instead():
    failing = base_facts(tiny_base("rwkv")).failing()

    assert "differ by" in failing["cached"]
    assert "finite" not in failing


@WARNINGS
def test_a_family_that_only_reads_images_refuses_a_text():
    with pytest.raises(ValueError, match="blip-2"):
        tiny_inputs(tiny_base("blip-2", IMAGE_TEXT), with_image=False)


def test_lists_name_a_class_once():
    assert "gpt2" in causal_families()
    assert "gpt-sw3" not in causal_families()
    assert {"gemma3", "gemma3_text"} <= set(causal_families())
    assert causal_families() == sorted(set(causal_families()))


@WARNINGS
@pytest.mark.slow
@pytest.mark.parametrize(("task", "model_type"), BOTH)
def test_every_family_runs_or_cannot(task, model_type):
    reason = why_not_tiny(model_type, task)
    if not reason:
        base = tiny_base(model_type, task)
        assert _extends_text(base, with_image=None)
        assert sum(parameter.numel() for parameter in base.parameters()) < 1_000_000
        return
    if "encoder-decoder" in reason:  # can be built, but is no decoder
        assert CONFIG_MAPPING[model_type].is_encoder_decoder or tiny_config(model_type, task).is_encoder_decoder
        return
    if "timm" in reason:
        with pytest.raises(ImportError, match="timm"):
            tiny_base(model_type, task)
        return
    with pytest.raises((AttributeError, RuntimeError, TypeError, ValueError, StrictDataclassError)):
        base = tiny_base(model_type, task)
        if not _extends_text(base, with_image=False):
            raise RuntimeError("generate does not extend the text")


@WARNINGS
@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in families(IMAGE_TEXT) if not why_not_tiny(name, IMAGE_TEXT)])
def test_every_image_matters_or_cannot_be_given(model_type):
    base = tiny_base(model_type, IMAGE_TEXT)
    if model_type in NO_IMAGE_INPUTS:
        with pytest.raises(ValueError):  # by the inputs, or in `generate`
            base.generate(**tiny_inputs(base, with_image=True), max_new_tokens=2)
        return
    inputs = tiny_inputs(base, with_image=True)
    assert _extends_text(base, with_image=True)
    pixels = next(name for name in ("pixel_values", "pixel_values_images", "flattened_patches") if name in inputs)
    # darker, but Kosmos 2.5 keeps a patch's place in its first two numbers
    darker = inputs[pixels].clone()
    darker[..., 2:] *= 0.3
    with torch.no_grad():
        before, after = base(**inputs).logits, base(**{**inputs, pixels: darker}).logits
    assert not torch.allclose(before, after, atol=1e-6)
    assert model_type in NEEDS_IMAGE or _extends_text(base, with_image=False)
