"""Load transcoders with circuit-tracer. Run by an interpreter that has it; nothing of ours is imported.

    python read_with_circuit_tracer.py FOLDER

`FOLDER/set`: `config.yaml` and a file for each layer; or `FOLDER/clt`: a cross-layer transcoder's files, Gemma Scope
2's or circuit-tracer's own. `FOLDER/x.safetensors`: `x` (n_layers, n, d_in). Writes `FOLDER/out.safetensors`:
`features` (n_layers, n, d_sae) and `reconstruction` (n_layers, n, d_out).
"""

import sys
from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder.cross_layer_transcoder import (  # pyright: ignore[reportMissingImports]
    load_clt,
    load_gemma_scope_2_clt,
)
from circuit_tracer.utils.hf_utils import load_transcoders  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


def load_set(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = sorted(folder.glob("layer_*.safetensors"), key=lambda file: int(file.stem.split("_")[1]))
    config |= {"transcoders": [str(file) for file in files], "repo_id": "", "scan": "ours"}
    return load_transcoders(config, CPU, lazy_decoder=False)


def load_cross_layer(folder):
    paths = sorted(map(str, folder.glob("params_layer_*.safetensors")))
    if not paths:
        return load_clt(str(folder), lazy_decoder=False, device=CPU, dtype=torch.float32)
    # 0.5.0 leaves out the last: findings/circuit_tracer_clt_without_last_layer.sh
    return load_gemma_scope_2_clt(dict(enumerate([*paths, paths[-1]])), device=CPU, dtype=torch.float32)


folder = Path(sys.argv[1])
loaded = load_set(folder / "set") if (folder / "set").is_dir() else load_cross_layer(folder / "clt")
x = load_file(folder / "x.safetensors")["x"]
with torch.no_grad():
    features = loaded.encode(x)
    reconstruction = loaded.decode(features, x)
save_file(
    {"features": features.contiguous(), "reconstruction": reconstruction.contiguous()}, folder / "out.safetensors"
)
