"""Load a cross-layer transcoder with circuit-tracer. Run by an interpreter that has it; nothing of ours is imported.

    python read_clt_with_circuit_tracer.py FOLDER

`FOLDER/clt`: its files, Gemma Scope 2's or circuit-tracer's own; `FOLDER/x.safetensors`: `x` (n_layers, n, d_in).
Writes `FOLDER/out.safetensors`: `features` (n_layers, n, d_sae) and `reconstruction` (n_layers, n, d_out).
"""

import sys
from pathlib import Path

import torch
from circuit_tracer.transcoder.cross_layer_transcoder import (  # pyright: ignore[reportMissingImports]
    load_clt,
    load_gemma_scope_2_clt,
)
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
options = {"device": torch.device("cpu"), "dtype": torch.float32}
paths = sorted(map(str, (folder / "clt").glob("params_layer_*.safetensors")))
if paths:  # 0.5.0 leaves out the last: findings/circuit_tracer_clt_without_last_layer.sh
    loaded = load_gemma_scope_2_clt(dict(enumerate([*paths, paths[-1]])), **options)
else:
    loaded = load_clt(str(folder / "clt"), lazy_decoder=False, **options)
x = load_file(folder / "x.safetensors")["x"]
with torch.no_grad():
    features = loaded.encode(x)
    reconstruction = loaded.decode(features, x)
save_file(
    {"features": features.contiguous(), "reconstruction": reconstruction.contiguous()}, folder / "out.safetensors"
)
