"""Our model against numbers that SCAR's own classes computed from a tiny checkpoint of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sae_transformers import SaeForCausalLM, SparseAutoencoder, SparseAutoencoderConfig

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures" / "checkpoints" / "scar"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the golden files are not part of the repository")


@pytest.fixture(scope="module", params=["topk_mlp", "jumprelu_mlp"])
def published(request):
    folder = FIXTURES / request.param
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    names = LlamaConfig().to_dict().keys() & settings.keys() - {"architectures", "model_type", "torch_dtype"}
    config = LlamaConfig(**{n: settings[n] for n in names})
    config._attn_implementation = "eager"
    config.rope_parameters = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    base = LlamaForCausalLM(config).eval()
    base.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("SAE.")})
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=settings["n_inputs"],
            d_sae=settings["n_latents"],
            activation=settings["activation"],
            k=settings["activation_k"] if settings["activation"] == "topk" else None,
            normalization="layer_norm",  # hard-coded there, whatever the config says
            layer=settings["hook_block_num"],
            site="mlp_out",
            concepts={"toxicity": 0},
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(tensors["SAE.encoder.weight"].T)
        sae.W_dec.copy_(tensors["SAE.decoder.weight"].T)
        sae.b_enc.copy_(tensors["SAE.latent_bias"])
        sae.b_dec.copy_(tensors["SAE.pre_bias"])
        if "SAE.threshold" in tensors:
            sae.threshold.copy_(tensors["SAE.threshold"].exp())
    cases = json.loads((folder / "golden.json").read_text())["settings"]["steering_cases"]
    base.generation_config.eos_token_id = None  # the golden runs do not stop
    return SaeForCausalLM.from_base(base, saes=[sae]), load_file(folder / "golden.safetensors"), cases


def close(ours, golden):
    scale = golden.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    assert ((ours - golden).abs() / scale).max() < 1e-5


@torch.no_grad()
def test_code_and_reconstruction(published):
    model, golden, _ = published
    x = golden["x"]
    rows = torch.arange(len(x)) != 2  # a tie, which may be broken either way
    close(model.saes[0].encode_pre_acts(x), golden["latents_pre_act"])
    close(model.saes[0].encode(x)[rows], golden["features"][rows])
    close(model.saes[0](x).reconstruction, golden["reconstruction"])


@torch.no_grad()
def test_steered_logits_and_hook_outputs(published):
    model, golden, cases = published
    mask = golden["attention_mask"].bool()
    inputs = {"input_ids": golden["input_ids"], "attention_mask": golden["attention_mask"]}
    close(model(**inputs, output_sae_inputs=True).sae_inputs[0][mask], golden["hooked_activation"][mask])
    for name, fields in cases.items():
        for field in ("mod_features", "mod_scaling", "mod_replacement"):
            setattr(model.hook, field, None)
        for field, value in fields.items():
            setattr(model.hook, field, value)
        seen = []
        handle = model.lm.model.layers[1].mlp.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        logits = model(**inputs).logits
        handle.remove()
        close(seen[0][mask], golden[f"hook_output.{name}"][mask])
        close(logits[mask], golden[f"logits.{name}"][mask])
        if f"generated.{name}" in golden:
            expected = golden[f"generated.{name}"]
            length = expected.shape[1] - inputs["input_ids"].shape[1]
            out = model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)
            assert torch.equal(out, expected)
    model.hook.mod_features = None
