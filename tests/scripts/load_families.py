"""Loads the models of many families by their remote code alone and compares their logits with those of before:
load_families.py FOLDER, with a folder for each family as `tests/architectures/grid.py` writes it. Prints JSON."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import blocked_library  # noqa: F401
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def difference(folder: Path, name: str) -> str:
    """The largest difference of logits, relative to the largest: idle and steered; or the error."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    if not type(model).__module__.startswith("transformers_modules."):
        return f"not by remote code: {type(model).__module__}"
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    steering = json.loads((folder / "steering.json").read_text())
    found = []
    for wanted, options in (("idle", {}), ("steered", {"steering": steering})):
        torch.manual_seed(0)
        logits = model(**inputs, **options).logits
        found.append(float((logits - expected[wanted]).abs().max() / expected[wanted].abs().max()))
    return json.dumps(found)


def main(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, str]] = {}
    for family in sorted(folder.iterdir()):
        for name in ("adapter", "full"):
            if (family / name).is_dir():
                try:
                    seen = difference(family, name)
                except Exception as error:
                    seen = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                results.setdefault(family.name, {})[name] = seen
    print("FOUND", json.dumps(results), flush=True)


main(Path(sys.argv[1]))
