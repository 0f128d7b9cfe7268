#!/usr/bin/env bash
# circuit-tracer 0.5.0, load_gemma_scope_2_clt: Gemma Scope 2's cross-layer transcoders do not load; the last layer is not read.
#
# Expected: the files of a cross-layer transcoder of three layers, numbered from 0 as `resolve_transcoder_paths` numbers them, give a
# `CrossLayerTranscoder` of three layers.
#
# What happens: two layers are read, the decoders of each still write to three places, and the state that is made does not fit the
# module: an error about sizes, which names no file. With the last layer given a second time, under the next number, it loads, and
# is right.
#
# Output seen:
#   layers 0 to 2: RuntimeError, size mismatch for W_dec.0: (10, 3, 6) from the files, (10, 2, 6) in the module
#   and the last one again as 3: 3 layers, decoders to [3, 2, 1] places
#
# Why: the loop over the layers ends at the largest number and not after it, `range(max(paths.keys()))`.
#
# Instead: give the last path under one more number, or read the files with another library.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet circuit-tracer==0.5.0 torch==2.13.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON' > "$folder/seen" 2> /dev/null
import re
import sys
from pathlib import Path

import torch
from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt
from safetensors.torch import save_file

folder, layers, d_model, d_sae = Path(sys.argv[1]), 3, 6, 10
paths = {}
for layer in range(layers):
    w_dec = torch.randn(d_sae, layers, d_model)
    w_dec[:, :layer] = 0
    tensors = {
        "w_enc": torch.randn(d_model, d_sae), "w_dec": w_dec, "b_enc": torch.randn(d_sae), "b_dec": torch.randn(d_model),
        "threshold": torch.rand(d_sae),
    }
    paths[layer] = str(folder / f"params_layer_{layer}.safetensors")
    save_file(tensors, paths[layer])
options = {"device": torch.device("cpu"), "dtype": torch.float32}
try:
    loaded = load_gemma_scope_2_clt(paths, **options)
    print("layers 0 to 2:", loaded.n_layers, "layers")
except RuntimeError as error:
    name, theirs, ours = re.search(r"(size mismatch for \S+): .*?\[(.*?)\].*?\[(.*?)\]", str(error)).groups()
    print(f"layers 0 to 2: RuntimeError, {name}: ({theirs}) from the files, ({ours}) in the module")
loaded = load_gemma_scope_2_clt({**paths, layers: paths[layers - 1]}, **options)
places = [weights.shape[1] for weights in loaded.W_dec]
print(f"and the last one again as 3: {loaded.n_layers} layers, decoders to {places} places")
PYTHON

diff "$folder/seen" - <<'SEEN'
layers 0 to 2: RuntimeError, size mismatch for W_dec.0: (10, 3, 6) from the files, (10, 2, 6) in the module
and the last one again as 3: 3 layers, decoders to [3, 2, 1] places
SEEN
cat "$folder/seen"
