"""Upload checkpoints to the Hub of HF_ENDPOINT and load them with this library by SAELens' names.

    python load_by_names.py FOLDER

In the folder: `uploads.json`, a list of [repository, file, path there]; `names.json`, a list of [release, sae_id];
`<n>.x.safetensors`. Writes `<n>.ours.json` and `<n>.ours.safetensors`."""

import dataclasses
import json
import sys
import warnings
from pathlib import Path

from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from sae_transformers import SparseAutoencoder

folder = Path(sys.argv[1])
warnings.simplefilter("ignore")
for repository, file, inside in json.loads((folder / "uploads.json").read_text()):
    HfApi().create_repo(repository, exist_ok=True)
    HfApi().upload_file(repo_id=repository, path_or_fileobj=file, path_in_repo=inside)
for number, (release, sae_id) in enumerate(json.loads((folder / "names.json").read_text())):
    sae = SparseAutoencoder.from_pretrained(f"sae_lens:{release}/{sae_id}").float()
    found = sae(load_file(folder / f"{number}.x.safetensors")["x"])
    tensors = {"features": found.latents.detach(), "reconstruction": found.reconstruction.detach()}
    save_file(tensors, folder / f"{number}.ours.safetensors")
    (folder / f"{number}.ours.json").write_text(json.dumps(dataclasses.asdict(sae.config)))
