"""Run an exported SAE with the library of its format. Run by that library's interpreter; nothing of ours is imported.

    python read_with_peer.py jobs.json

`jobs.json`: a list of `{"format", "folder", "x", "out"}`. For each, `x` (a safetensors file with `x` (n, d_in)) goes
through the library's own loader, encoder and decoder, and `features` and `reconstruction` are written to `out`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def run_saelens(folder, x):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = SAE.load_from_disk(folder)
    if sae.cfg.reshape_activations == "hook_z":
        x = x.unflatten(-1, (4, -1))
    features = sae.encode(x)
    out = sae(x)
    return features, out.flatten(1)


def run_folded_saelens(folder, x):
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = SAE.load_from_disk(folder)
    sae.fold_W_dec_norm()
    return sae.encode(x), sae(x)


def run_sparsify(folder, x):
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    coder = SparseCoder.load_from_disk(folder)
    chosen = coder.encode(x)
    features = torch.zeros(len(x), coder.num_latents).scatter_(-1, chosen.top_indices, chosen.top_acts)
    return features, coder(x).sae_out


def run_dictionary_learning(folder, x):
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    dictionary, _ = load_dictionary(folder, "cpu")
    features = dictionary.encode(x)
    return features, dictionary.decode(features)


RUN = {
    "saelens": run_saelens,
    "folded saelens": run_folded_saelens,
    "sparsify": run_sparsify,
    "dictionary_learning": run_dictionary_learning,
}


@torch.no_grad()
def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        features, reconstruction = RUN[job["format"]](job["folder"], load_file(job["x"])["x"])
        save_file({"features": features.contiguous(), "reconstruction": reconstruction.contiguous()}, job["out"])


if __name__ == "__main__":
    main()
