"""Load a set of transcoders with circuit-tracer. Run by an interpreter that has it; nothing of ours is imported.

    python read_with_circuit_tracer.py FOLDER

`FOLDER/set`: `config.yaml` and a file for each layer; `FOLDER/x.safetensors`: `x` (n_layers, n, d_in). Writes
`FOLDER/out.safetensors`: `features` (n_layers, n, d_sae) and `reconstruction` (n_layers, n, d_out).
"""

import sys
from pathlib import Path

import torch
import yaml
from circuit_tracer.utils.hf_utils import load_transcoders  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "set" / "config.yaml").read_text())
files = sorted((folder / "set").glob("layer_*.safetensors"), key=lambda file: int(file.stem.split("_")[1]))
config |= {"transcoders": [str(file) for file in files], "repo_id": "", "scan": "ours"}
loaded = load_transcoders(config, torch.device("cpu"), lazy_decoder=False)
x = load_file(folder / "x.safetensors")["x"]
with torch.no_grad():
    features = loaded.encode(x)
    reconstruction = loaded.decode(features, x)
save_file(
    {"features": features.contiguous(), "reconstruction": reconstruction.contiguous()}, folder / "out.safetensors"
)
