"""Uploads a small SAE for each release of Gemma Scope 2, and Qwen Scope 3.5, where the release has it; attaches it.

python scope_releases.py FOLDER: to the Hub of HF_ENDPOINT; one JSON object, release -> what was seen.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from sae_transformers import FeatureEdit, SaeForCausalLM, SparseAutoencoder, Steering
from sae_transformers.modeling.conversion.names.releases import releases
from tests.architectures.tiny_bases import CAUSAL, IMAGE_TEXT, tiny_base, tiny_inputs
from tests.tiny import tiny_sae

STEERING = Steering([FeatureEdit(feature=3, op="direction", value=4.0)])
HOOKS = {"resid_post": "model.layers.1.output", "mlp_out": "model.layers.1.post_feedforward_layernorm.output"}
folder, api, seen = Path(sys.argv[1]), HfApi(), {}


def attached(name, base):
    """Whether an SAE does, from its short name, what its own vector does by hand, and leaves the rest alone."""
    sae = SparseAutoencoder.from_pretrained(name)
    inputs = tiny_inputs(base, with_image=bool(base.config.sub_configs))
    model = SaeForCausalLM.from_base(base, saes=[sae], force=True)
    text = base.model.language_model if base.config.sub_configs else base.model
    block = text.layers[1]
    place = block.post_feedforward_layernorm if sae.config.hook and "norm" in sae.config.hook else block
    with torch.no_grad():
        idle, plain = model(**inputs).logits, base(**inputs).logits
        steered = model(**inputs, steering=STEERING).logits
        added = 4.0 * sae.W_dec[3]
        hook = place.register_forward_hook(
            lambda module, args, out: out + added if isinstance(out, torch.Tensor) else (out[0] + added, *out[1:])
        )
        by_hand = base(**inputs).logits
        hook.remove()
    return [torch.equal(idle, plain), torch.allclose(steered, by_hand, atol=1e-5), not torch.equal(plain, steered)]


def gemma(release):
    """A release's two files, and the base of its size: those from 4B up read images."""
    repository, values = releases()[release].repository, releases()[release].values
    width = values["width"][0]
    sites = [site for site in HOOKS if site in values["site"]]
    for site in sites:
        hook = HOOKS[site]
        place = folder / release / site / f"layer_1_width_{width}_l0_medium"
        place.mkdir(parents=True)
        sae = tiny_sae(activation="jumprelu")
        names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
        tensors = {theirs: getattr(sae, ours).detach().clone() for theirs, ours in names.items()}
        save_file(tensors, place / "params.safetensors")
        config = {"architecture": "jump_relu", "width": 64, "affine_connection": False, "hf_hook_point_in": hook}
        config |= {"hf_hook_point_out": hook, "model_name": releases()[release].base}
        (place / "config.json").write_text(json.dumps(config))
    api.create_repo(repository)
    api.upload_folder(repo_id=repository, folder_path=folder / release)
    small = release.split("-")[3] in ("270m", "1b")
    base = tiny_base("gemma3_text", CAUSAL) if small else tiny_base("gemma3", IMAGE_TEXT)
    return [attached(f"{release}/{site}/1/{width}/medium", base) for site in sites]


def qwen(release):
    """The same for a release of which a layer is a file."""
    repository = releases()[release].repository
    sae = tiny_sae(activation="topk", k=50)
    names = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    (folder / release).mkdir()
    torch.save({k: v.detach().clone().contiguous() for k, v in names.items()}, folder / release / "layer1.sae.pt")
    api.create_repo(repository)
    api.upload_folder(repo_id=repository, folder_path=folder / release)
    return [attached(f"{release}/1", tiny_base("qwen3_5", IMAGE_TEXT))]


for release in releases():
    if release.startswith("gemma-scope-2-"):
        seen[release] = gemma(release)
    elif release.startswith("qwen-scope-3.5-") and release.endswith("l50") and "a3b" not in release:
        seen[release] = qwen(release)
print(json.dumps(seen))
