"""Pushes an SAE to the Hub of HF_ENDPOINT and reads it back; answers as JSON on stdout."""

import json
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download

from sae_transformers import SparseAutoencoder
from tests.tiny import tiny_sae

sae = tiny_sae(layer=1, concepts={"good": 3}, metadata={"base_model": "tester/base"})
sae.measure_feature_max(torch.randn(50, sae.config.d_in))
sae.push_to_hub("tester/my-sae", private=True, commit_message="First")
loaded = SparseAutoencoder.from_pretrained("tester/my-sae")
same = all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in sae.state_dict().items())
try:
    sae.push_to_hub("tester/my-sae", colour="blue")
    told = ""
except TypeError as error:
    told = str(error)
card = Path(hf_hub_download("tester/my-sae", "README.md")).read_text(encoding="utf-8")
files = sorted(HfApi().list_repo_files("tester/my-sae"))
print(json.dumps({"same": same, "concepts": loaded.config.concepts, "card": card, "files": files, "told": told}))
