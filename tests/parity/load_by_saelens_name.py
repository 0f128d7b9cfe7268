"""Load SAEs by SAELens' names with SAELens. Run by an interpreter that has it; nothing of ours is imported.

    HF_ENDPOINT=... python load_by_saelens_name.py names.json out

`names.json`: a list of [release, sae_id]. Writes `out/<n>.json`, the config, and `out/<n>.safetensors`: `features` and
`reconstruction` of the input that `out/<n>.x.safetensors` holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(names: str, out: str) -> None:
    for number, (release, sae_id) in enumerate(json.loads(Path(names).read_text())):
        sae, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id)
        x = load_file(Path(out) / f"{number}.x.safetensors")["x"]
        features = sae.encode(x.unflatten(-1, (3, -1)) if sae.cfg.reshape_activations == "hook_z" else x)
        reconstruction = sae.decode(features)
        tensors = {"features": features, "reconstruction": reconstruction.reshape(len(x), -1)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, Path(out) / f"{number}.safetensors")
        config = sae.cfg.to_dict()
        (Path(out) / f"{number}.json").write_text(json.dumps({**config, **config["metadata"]}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
