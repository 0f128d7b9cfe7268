"""Uploads checkpoints of other libraries to the Hub of HF_ENDPOINT and reads them back; answers as JSON on stdout.

python foreign_saes.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

from sae_transformers import SparseAutoencoder
from sae_transformers.modeling.conversion import Checkpoint, sae_ids
from tests.modeling.conversion.families import B_DEC, FAMILIES, W_DEC

folder = Path(sys.argv[1])
api = HfApi()
answers: dict[str, object] = {}


def fetched(repository: str) -> list[str]:
    """Files of a repository that the cache holds."""
    cache = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return sorted({path.relative_to(cache).as_posix().split("/", 1)[1] for path in cache.rglob("*") if path.is_file()})


# A release with several SAEs: two layers of Gemma Scope 2, and a second commit that changes one.
root = folder / "gemma"
FAMILIES["gemma_scope_2"](root)
one = root / "resid_post" / "layer_1_width_16k_l0_small"
two = root / "resid_post" / "layer_2_width_16k_l0_small"
two.mkdir()
for file in one.iterdir():
    (two / file.name).write_bytes(file.read_bytes().replace(b"layers.1.", b"layers.2."))
gemma = api.create_repo("tester/gemma-scope-2-270m-pt").repo_id
first = api.upload_folder(repo_id=gemma, folder_path=root).oid
save_file(
    {"w_enc": W_DEC.T.contiguous(), "w_dec": W_DEC * 2, "b_enc": torch.zeros(len(W_DEC)), "b_dec": B_DEC,
     "threshold": torch.zeros(len(W_DEC))},
    one / "params.safetensors",
)  # fmt: skip
api.upload_folder(repo_id=gemma, folder_path=root)
inside = "resid_post/layer_1_width_16k_l0_small"
old = SparseAutoencoder.from_pretrained(gemma, sae_id=inside, revision=first)
new = SparseAutoencoder.from_pretrained(f"{gemma}/{inside}")
answers["revision"] = [torch.equal(old.W_dec, W_DEC), torch.equal(new.W_dec, W_DEC * 2)]
answers["place"] = new.config.hook
answers["ids"] = sorted(sae_ids(Checkpoint(gemma)))
for name, options in {"several": {}, "wrong": {"sae_id": "resid_post/layer_9"}}.items():
    try:
        SparseAutoencoder.from_pretrained(gemma, **options)
    except (ValueError, OSError) as error:
        answers[name] = f"{type(error).__name__}: {error}"
answers["fetched"] = fetched(gemma)

# SCAR in two shards, one of which is the language model's alone.
root = folder / "scar"
FAMILIES["scar"](root)
(root / "model.safetensors").rename(root / "model-00002-of-00002.safetensors")
save_file({"model.embed_tokens.weight": torch.zeros(9, 12)}, root / "model-00001-of-00002.safetensors")
names = ["SAE.pre_bias", "SAE.latent_bias", "SAE.encoder.weight", "SAE.decoder.weight", "lm_head.weight"]
index = {name: "model-00002-of-00002.safetensors" for name in names}
index["model.embed_tokens.weight"] = "model-00001-of-00002.safetensors"
(root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
scar = api.create_repo("tester/scar").repo_id
api.upload_folder(repo_id=scar, folder_path=root)
answers["scar"] = [SparseAutoencoder.from_pretrained(scar).config.activation, fetched(scar)]

# Offline, from the cache.
constants.HF_HUB_OFFLINE = True
again = SparseAutoencoder.from_pretrained(gemma, sae_id=inside, local_files_only=True)
answers["offline"] = torch.equal(again.W_dec, new.W_dec)
print(json.dumps(answers))
