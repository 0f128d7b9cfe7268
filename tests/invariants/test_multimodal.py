"""A base that reads images: features and steering with an image in the prompt, published SAEs, LoRA, pipelines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    pipeline,
)
from typer.testing import CliRunner

from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.cli import app
from tests.invariants.published import clean_environment, run_script
from tests.multimodal import multimodal, picture, processor
from tests.tiny import tiny_sae

GREEDY = {"max_new_tokens": 6, "do_sample": False}
PUSH = [FeatureEdit(feature=3, op="set", value=9.0), FeatureEdit(feature=5, op="direction", value=4.0)]
STEERING = Steering(PUSH, positions="generated")


@pytest.mark.parametrize("place", [{"layer": 1}, {"hook": "model.layers.1.output"}], ids=["layer", "hook"])
def test_a_multimodal_base_is_read_and_steered_with_an_image_in_its_prompt(place, tmp_path):
    base, inputs = multimodal()
    model = SaeForCausalLM.from_base(copy.deepcopy(base), saes=[tiny_sae(**place)], weights_scope="full")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        hidden = base(**inputs, output_hidden_states=True).hidden_states[2]
        sae = model.saes[0]
        expected = ((hidden - sae.b_dec) @ sae.W_enc + sae.b_enc)[..., 3].mean(-1)
    plain = base.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    torch.testing.assert_close(
        model.detect(inputs, feature=3, pre_activations=True, skip_first=0).per_text, expected, rtol=1e-5, atol=1e-5
    )
    steering = STEERING
    steered = model.generate(**inputs, steering=steering, **GREEDY)
    assert not torch.equal(steered, plain)
    assert torch.equal(model.generate(**inputs, steering=steering, use_cache=False, **GREEDY), steered)
    model.save_pretrained(tmp_path)
    loaded = SaeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**inputs, steering=steering, **GREEDY), steered)
    loaded.resize_token_embeddings(310, mean_resizing=False)
    assert loaded(**inputs).logits.shape[-1] == loaded.config.get_text_config().vocab_size == 310


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its processor, as a repository on the Hub has them."""
    folder = tmp_path_factory.mktemp("gemma-3-4b-it")
    base, _ = multimodal()
    base.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def scope_folder(tmp_path: Path) -> Path:
    """An SAE in Gemma Scope 2's layout, for the wrapper's blocks under the text model's name."""
    folder = tmp_path / "scope" / "resid_post" / "layer_1_width_64_l0_medium"
    folder.mkdir(parents=True)
    sae = tiny_sae(activation="jumprelu")
    names = {
        "w_enc": sae.W_enc,
        "w_dec": sae.W_dec,
        "b_enc": sae.b_enc,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold,
    }
    save_file({name: tensor.detach().clone() for name, tensor in names.items()}, folder / "params.safetensors")
    place = dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.1.output")
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-4b-it",
        "width": 64,
        "affine_connection": False,
    }
    (folder / "config.json").write_text(json.dumps({**config, **place}))
    return folder


@pytest.mark.slow
def test_a_published_sae_by_the_command_and_by_remote_code(base_folder, scope_folder, tmp_path):
    """Attached, then loaded where the library cannot be imported, and steered with an image in the prompt."""
    out = tmp_path / "attached"
    command = ["attach", "--sae", str(scope_folder), "--base", str(base_folder), "--out", str(out), "--force"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (out / "processor_config.json").is_file() or (out / "preprocessor_config.json").is_file()
    base, inputs = multimodal()
    hand = SaeForCausalLM.from_base(base, saes=[SparseAutoencoder.from_pretrained(scope_folder)], force=True)
    with torch.no_grad():
        expected = hand.generate(**inputs, steering=STEERING, **GREEDY)
        assert not torch.equal(expected, base.generate(**inputs, **GREEDY))
    job = tmp_path / "job"
    job.mkdir()
    save_file({k: v.contiguous() for k, v in inputs.items()}, job / "inputs.safetensors")
    (job / "steering.json").write_text(STEERING.to_json())
    run_script("load_multimodal.py", out, job, folder=job, env=clean_environment(tmp_path / "home"))
    assert torch.equal(load_file(job / "tokens.safetensors")["tokens"], expected)


def test_the_pipeline_gives_what_generate_gives(base_folder, tmp_path):
    model = SaeForCausalLM.from_base(str(base_folder), saes=[tiny_sae(layer=1)])
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is SaeForCausalLM
    text = "w5 <start_of_image> w7 w8"
    ready = processor()
    pipe: Any = pipeline("image-text-to-text", model=loaded, processor=ready)
    inputs = ready(text=text, images=[picture()], return_tensors="pt")
    for steering in (False, STEERING):
        options = {"steering": steering, **GREEDY}
        (found,) = pipe(text=text, images=[picture()], generate_kwargs=options, return_full_text=False)
        with torch.no_grad():
            tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert found["generated_text"].split() == ready.decode(tokens, skip_special_tokens=True).split()


CHAT_TEMPLATE = """<bos> {% for turn in messages %}{% for part in turn.content %}{% if part.type == 'image' %}\
<start_of_image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"""


def test_a_chat_with_an_image_is_what_its_text_is(base_folder):
    model = SaeForCausalLM.from_base(str(base_folder), saes=[tiny_sae(layer=1)])
    model.generation_config.eos_token_id = None
    ready = processor()
    ready.chat_template = CHAT_TEMPLATE
    content = [
        {"type": "text", "text": "w5"},
        {"type": "image", "image": picture()},
        {"type": "text", "text": "w7 w8"},
    ]
    chat = [{"role": "user", "content": content}]
    inputs = ready.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    text = "<bos> w5 <start_of_image> w7 w8 "
    alone = ready(text=text, images=[picture()], return_tensors="pt", add_special_tokens=False)
    assert torch.equal(inputs["input_ids"], alone["input_ids"]) and torch.equal(
        inputs["pixel_values"], alone["pixel_values"]
    )
    with torch.no_grad():
        found = model.generate(**inputs, steering=STEERING, **GREEDY)
        assert torch.equal(found, model.generate(**alone, steering=STEERING, **GREEDY))
        assert not torch.equal(found, model.generate(**inputs, **GREEDY))
    assert torch.equal(
        model.detect(inputs, feature=3, pre_activations=True, skip_first=0).per_text,
        model.detect(alone, feature=3, pre_activations=True, skip_first=0).per_text,
    )


def test_lora_beside_it_trains_and_the_sae_stays():
    base, inputs = multimodal()
    model = SaeForCausalLM.from_base(base, saes=[tiny_sae(layer=1)])
    with torch.no_grad():
        expected = model(**inputs, steering=STEERING).logits
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert torch.equal(adapted(**inputs, steering=STEERING).logits, expected)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first step moves B only, since A times 0 is 0
        adapted(**inputs, labels=inputs["input_ids"], steering=STEERING).loss.backward()
        optimizer.step()
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name and "language_model" in name for name in changed)
    assert adapted.generate(**inputs, steering=STEERING, **GREEDY).shape == (2, 18)
