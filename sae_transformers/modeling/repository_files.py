"""Files of a repository: the card it starts with, tensors read safely, texts written whole."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

CARD = """---
library_name: transformers
tags:
- sparse-autoencoder
- steering
{base_line}---

# {title}

{base} with {count} sparse autoencoder(s) in its forward pass:

| SAE | reads | latents | activation | concepts |
|---|---|---|---|---|
{rows}

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo}", trust_remote_code=True)
```

The model code in this repository needs nothing but `transformers` and PyTorch. Pin `revision=` to a commit you have
read.
"""


def model_card(model: Any, repo: str) -> str:
    """A first model card; `hub_cards` makes a full one from measured values."""
    base = model.config.base_model_name_or_path
    public = base if base and not Path(base).is_absolute() else None
    rows = [
        f"| {n} | {c.read_at} | {c.d_sae} | {c.activation} | {', '.join(c.concepts) or '-'} |"
        for n, c in enumerate(model.config.sae_configs)
    ]
    return CARD.format(
        base_line=f"base_model: {public}\n" if public else "",
        title=repo,
        base=f"`{public}`" if public else f"A `{model.config.text_config.model_type}` model",
        count=len(rows),
        rows="\n".join(rows),
        auto_class=model.auto_model.__name__,
        repo=repo,
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def check_writable(folder: str | os.PathLike) -> None:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f"The output folder cannot be written; give another. Received: {str(folder)!r} ({error})."
        ) from error


def check_base(expected: PreTrainedConfig, found: PreTrainedConfig, name: str) -> None:
    for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(expected, field, None) != getattr(found, field, None):
            raise ValueError(
                f"The SAEs in {name} were made for a base with {field}={getattr(expected, field, None)!r}. "
                f"Received: a base with {field}={getattr(found, field, None)!r}."
            )


def read_adapter(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter-sized checkpoint, from one safetensors file or several."""
    quiet = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(name, SAFE_WEIGHTS_NAME, **hub, **quiet)
    paths = [path] if path is not None else []
    if path is None and (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub, **quiet)) is not None:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [cached_file(name, shard, **hub) for shard in shards]
    if not paths:
        if cached_file(name, WEIGHTS_NAME, **hub, **quiet) is not None:
            raise ValueError(
                f"{name} holds a pickle ({WEIGHTS_NAME}), which can run code and is not read. Expected safetensors."
            )
        raise OSError(f"{name} holds no {SAFE_WEIGHTS_NAME}.")
    weights: dict[str, Tensor] = {}
    for file in paths:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                names = tensors.keys()
                weights.update({name: tensors.get_tensor(name) for name in names})
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short: {error}. Download or save it again.") from error
    return weights
