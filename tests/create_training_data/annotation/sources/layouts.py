"""Files of made-up contents in the layouts of others: Neuronpedia's and delphi's, from the schemas they document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODEL, SOURCE = "tiny-llama", "1-made-up-res-64"
OF = {"modelId": MODEL, "layer": SOURCE}
EXPLANATIONS = [
    {"index": "3", "description": " remarks that mean the opposite", "explanationModelName": "gpt-4o-mini",
     "typeName": "oai_token-act-pair", "embedding": "[0.6, 0.8]"},
    {"index": "5", "description": "rivers", "explanationModelName": "gpt-4o-mini", "embedding": [1, 0]},
    {"index": "5", "description": "fresh water", "scores": [{"value": 0.5}, {"value": 1.0}]},
    {"index": "40", "description": None},
]  # fmt: skip
FEATURES = [
    {"index": "3", "maxActApprox": 12.5, "frac_nonzero": 0.002, "topkCosSimIndices": [3, 5, 7], "pos_str": [" not"]},
    {"index": "5", "maxActApprox": 4.0, "frac_nonzero": 0.3, "hookName": "blocks.1.hook_resid_post"},
    {"index": "63", "maxActApprox": 0, "frac_nonzero": 0},
]
ACTIVATIONS = [
    {"index": "3", "tokens": [" so", " funny"], "values": [0.0, 9.5], "maxValue": 9.5, "maxValueTokenIndex": 1},
    {"index": "3", "tokens": [" oh", " great"], "values": [11.0, 0.5], "maxValue": 11.0, "maxValueTokenIndex": 0},
]


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps({"id": "cx", **OF, "authorId": "x", "umap_x": 0.1, **row}) + "\n" for row in rows)


def write_bulk(folder: Path, rows_each: int = 2, zipped: bool = True, **kinds: Sequence[dict[str, Any]]) -> Path:
    """A source's folder: batches of each kind with so many rows."""
    kinds = kinds or {"explanations": EXPLANATIONS, "features": FEATURES, "activations": ACTIVATIONS}
    for kind, rows in kinds.items():
        (folder / kind).mkdir(parents=True)
        for number, start in enumerate(range(0, len(rows), rows_each)):
            text = lines(rows[start : start + rows_each]).encode()
            file = folder / kind / f"batch-{number}.jsonl{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(text) if zipped else text)
    (folder / "source.jsonl").write_text(json.dumps({"id": SOURCE, "modelId": MODEL}) + "\n")
    return folder


def write_delphi(folder: Path, module: str = "layers.1", others: Sequence[str] = ()) -> Path:
    """A run of delphi's: three explanations, two scorers, activations of two latents on 2 rows of 8 tokens."""
    for one in (module, *others):
        for latent, text in {3: "remarks that mean the opposite", 12: "rivers", 40: "<b>bold</b>"}.items():
            _write(folder / "explanations" / f"{one}_latent{latent}.txt", text)
    judged = [{"correct": True, "activating": True}, {"correct": True}, {"correct": False}, {"correct": None}]
    _write(folder / "scores" / "detection" / f"{module}_latent3.txt", judged)
    _write(folder / "scores" / "fuzz" / f"{module}_latent3.txt", [{"correct": True}, {"correct": True}])
    _write(folder / "scores" / "fuzz" / f"{module}_latent12.txt", [{"correct": None}])
    _write(folder / "run_config.json", {"explainer_model": "llama-3.1-70b", "model": MODEL})
    (folder / "latents" / module).mkdir(parents=True)
    tensors = {
        "locations": np.array([[0, 1, 3], [0, 2, 3], [1, 7, 12]], np.uint16),
        "activations": np.array([1.5, 2.5, 4.0], np.float16), "tokens": np.zeros((2, 8), np.int64),
    }  # fmt: skip
    save_file(tensors, folder / "latents" / module / "0_31.safetensors")
    shifted = tensors | {"locations": np.array([[0, 0, 8]], np.uint16), "activations": np.array([7.0], np.float16)}
    save_file(shifted, folder / "latents" / module / "32_63.safetensors")
    return folder


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
