"""Folders as `save_pretrained`, `harvest`, `spans` and `judge` write them, without running a model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CODE = {"configuration_sae": "SaeConfig", "modeling_sae_causal_lm": "SaeForCausalLM"}
AUTO_MAP = {
    "AutoConfig": "configuration_sae.SaeConfig",
    "AutoModelForCausalLM": "modeling_sae_causal_lm.SaeForCausalLM",
}
SAE = {"d_in": 8, "d_sae": 16, "activation": "topk", "k": 2, "layer": 1, "site": "resid_post"}
CARD = "---\ntags:\n- sparse-autoencoder\n---\n\n# by hand\n"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config(*saes: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "architectures": ["SaeForCausalLM"], "auto_map": AUTO_MAP, "model_type": "sae_transformer",
        "base_model_name_or_path": "org/base", "base_model_revision": None, "saes": list(saes) or [SAE],
        "text_config": {"model_type": "llama"}, "weights_scope": "sae", "steering": None, **values,
    }  # fmt: skip


def safetensors(path: Path, numbers: int = 4, metadata: dict[str, str] | None = None) -> None:
    """A file of one tensor of zeros."""
    header: dict[str, Any] = {"saes.0.b_dec": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * numbers))


def model(folder: Path, *saes: dict[str, Any], **values: Any) -> Path:
    """A model's folder; `values` go into its config."""
    write_json(folder / "config.json", config(*saes, **values))
    safetensors(folder / "model.safetensors")
    (folder / "configuration_sae.py").write_text("class SaeConfig:\n    pass\n")
    (folder / "steering.py").write_text("class Steering:\n    pass\n")
    (folder / "modeling_sae_causal_lm.py").write_text(
        "from .steering import Steering\n\n\nclass SaeForCausalLM:\n    pass\n"
    )
    (folder / "README.md").write_text(CARD)
    return folder


def harvest(folder: Path, **values: Any) -> Path:
    """A store of hidden states of two shards."""
    index = {
        "format": "sae_transformers hidden states", "version": 1, "model": "org/base", "revision": "abc",
        "places": {"layers.1.resid_post": 8}, "dtype": "bfloat16", "labels": ["toxic"],
        "settings": {"max_length": 64, "pack": None, "source": {"column": "text", "text": "texts|.csv", "rows": 1234}},
        **values,
    }  # fmt: skip
    write_json(folder / "index.json", index)
    for number in range(2):
        safetensors(folder / f"shard-{number:06d}.safetensors", numbers=100)
    write_json(folder / "complete.json", {"n_tokens": 4321, "shards": [4000, 321]})
    return folder


def spans(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = {"feature": [0, 0, 7], "text_id": [1, 2, 3], "score": [3.0, 2.0, 1.0], "position": [4, 5, 6],
             "start": [0, 1, 2], "end": [5, 6, 7], "span": ["one", "two", "three"]}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "spans.parquet")
    write_json(folder / "spans.json", {"d_sae": 16, "n_texts": 50, "n_tokens": 900})
    index = {"format": "sae_transformers text spans", "version": 1, "place": "layers.1.resid_post", "d_sae": 16,
             "settings": {"top_n": 2, "window": 5}, "source": {"text": "/home/me/texts.jsonl"}}  # fmt: skip
    write_json(folder / "work" / "index.json", index)
    safetensors(folder / "work" / "part-00000.safetensors")
    return folder


ANNOTATIONS = (
    "FeatureID\tTask\tVerify\tSummary\tWords\n"
    "3\tyes|||It fits. Final Decision: [[ yes ]]\tprobably\tPraise of | films.\tSpan 1: great\\nSpan 2: good\n"
    "5\tno|||No.\tyes\t<b>Dates</b>\\n---\tSpan 1: 1999\n"
    "6\t-\t-\tCannot Tell.\t\n"
)
