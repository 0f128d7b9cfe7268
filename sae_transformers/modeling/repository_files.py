"""Files of a repository: the card it starts with, tensors read safely, texts written whole."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from .card_texts import base_line, code, hub_id, markdown, quoted
from .plain_files import check_plain, opened_tensors, read_json

HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token", "subfolder")
MAPPED_FROM_BYTES = 2**26
SHARD = re.compile(r"[\w.-]+\.safetensors")

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


def whole_path(name: str) -> str:
    """A folder of this machine by its absolute path, so that it is found from any folder; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() and not Path(name).is_absolute() else name


def model_card(model: Any, repo: str) -> str:
    """A first model card; `hub_cards` makes a full one from measured values."""
    public = hub_id(model.config.base_model_name_or_path)
    rows = [
        " | ".join(map(markdown, (c.read_at, c.d_sae, c.activation, ", ".join(c.concepts) or "-")))
        for c in model.config.sae_configs
    ]
    return CARD.format(
        base_line=base_line(public, adapter=model.config.weights_scope != "full"),
        title=markdown(repo),
        base=code(public) if public else f"A {code(model.config.text_config.model_type)} model",
        count=len(rows),
        rows="\n".join(f"| {n} | {row} |" for n, row in enumerate(rows)),
        auto_class=model.auto_model.__name__,
        repo=quoted(repo),
    )


def commit_of(name: str, options: dict[str, Any]) -> str | None:
    """The commit that a Hub repository is at under `options["revision"]`; None for a folder or where it is unknown."""
    if Path(name).is_dir():
        return None
    with contextlib.suppress(OSError):  # whatever is wrong, loading says it better
        path = cached_file(name, CONFIG_NAME, **{k: options[k] for k in HUB_OPTIONS if options.get(k) is not None})
        return extract_commit_hash(path, None)
    return None


def config_values(name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """What the `config.json` of a folder or repository holds; None where there is none.

    Raises:
        ValueError: it is no plain file, too long, or holds no JSON object.
    """
    path = cached_file(name, CONFIG_NAME, **hub, _raise_exceptions_for_missing_entries=False)
    if path is None:
        inside = Path(name, hub.get("subfolder") or "", CONFIG_NAME)
        if inside.exists():  # or it would count as missing
            check_plain(inside)
        return None
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object. Download or save it again.")
    return values


def check_is_base(source: str, options: dict[str, Any], name: str, model_type: str) -> None:
    """Raises ValueError where what `name` has for its base is a model with SAEs, perhaps itself."""
    hub = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
    if (config_values(source, hub) or {}).get("model_type") == model_type:
        raise ValueError(
            f"The base of {name} is a model with SAEs, or itself. Expected a model without. Received: "
            f"base_model_name_or_path={source!r}."
        )


def check_base(expected: PreTrainedConfig, found: PreTrainedConfig, name: str) -> None:
    for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if getattr(expected, field, None) != getattr(found, field, None):
            raise ValueError(
                f"The SAEs in {name} were made for a base with {field}={getattr(expected, field, None)!r}. "
                f"Received: a base with {field}={getattr(found, field, None)!r}."
            )


def check_quantization(base: nn.Module, scope: str) -> None:
    """A quantised base is its loader's: its packed weights, saved from here, would come back as other numbers."""
    quantized = next((m for m in base.modules() if getattr(m, "is_quantized", False) is True), None)
    if quantized is None:
        return
    method = getattr(quantized, "quantization_method", None)
    method = getattr(method, "value", method)
    if scope == "full":
        raise ValueError(
            f"A quantised base cannot be saved whole. Expected weights_scope='sae', which points to the base. "
            f"Received: weights_scope='full', quantisation by {method}. Or put the SAEs into the unquantised base."
        )
    warnings.warn(
        f"The base is quantised ({method}), and the checkpoint names it without that: give `quantization_config=` to "
        f"`from_pretrained` for the same numbers.",
        stacklevel=4,
    )


def weight_files(name: str, hub: dict[str, Any]) -> list[str]:
    """The safetensors files of a repository, fetched where needed: one, or the shards that an index names."""
    quiet = {"_raise_exceptions_for_missing_entries": False}
    path = cached_file(name, SAFE_WEIGHTS_NAME, **hub, **quiet)
    if path is not None:
        return [str(path)]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub, **quiet)
    if index is not None:
        return [str(cached_file(name, shard, **hub)) for shard in _shards(read_json(index), index)]
    for pickle in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if cached_file(name, pickle, **hub, **quiet) is not None:
            raise ValueError(
                f"{name} holds a pickle ({pickle}), which can run code and is not read. Expected safetensors."
            )
    raise OSError(f"{name} holds no {SAFE_WEIGHTS_NAME}.")


def _shards(index: Any, where: str) -> list[str]:
    """The files that an index names, each a file beside it."""
    shards = index.get("weight_map") if isinstance(index, dict) else None
    files = list(shards.values()) if isinstance(shards, dict) else []
    if not files or not isinstance(index.get("metadata", {}), dict):
        raise ValueError(
            f"{where} is damaged: `weight_map` must say in which file each tensor is, and `metadata` be an object. "
            "Download or save it again."
        )
    if strange := [file for file in files if not isinstance(file, str) or not SHARD.fullmatch(file)]:
        raise ValueError(f"{where} is damaged: it names {strange[0]!r}, expected a safetensors file beside it.")
    return sorted(set(files))


def check_generation_config(name: str, hub: dict[str, Any]) -> None:
    """Raises ValueError where a `generation_config.json` is there and cannot be used."""
    path = cached_file(name, GENERATION_CONFIG_NAME, **hub, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    values = read_json(path)
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # whatever comes of values of other types
        raise ValueError(f"{path} is no generation config: {error!r}.") from error


def read_adapter(name: str, hub: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names start with `prefix`, which is cut off; from one safetensors file or
    several. Large ones are mapped; small ones are read into memory of their own, whose alignment makes products repeat
    bit for bit."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(name, hub):
        with opened_tensors(file) as tensors:
            names = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118
            found = {key[len(prefix) :]: tensors.get_tensor(key) for key in names}
        small = {key: t for key, t in found.items() if t.numel() * t.element_size() < MAPPED_FROM_BYTES}
        weights |= found | read_again(file, small, prefix)
    return weights


def read_again(path: str, mapped: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors in memory of their own, not by way of the file's mapping, whose pages would count too."""
    own: dict[str, Tensor] = {}
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for key, tensor in mapped.items():
            start, end = header[prefix + key]["data_offsets"]
            file.seek(8 + length + start)
            values = torch.empty(end - start, dtype=torch.uint8)
            if file.readinto(values.numpy().data) != end - start:
                raise ValueError(f"{path} is cut short. Download or save it again.")
            own[key] = values.view(tensor.dtype).view(tensor.shape)
    return own


def check_values(key: str, tensor: Tensor, name: str) -> None:
    # Types of one byte have no arithmetic to check them with.
    readable = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0
    if tensor.ndim == 2 and not tensor.is_contiguous():  # a transpose, which would be copied
        tensor = tensor.T
    # The extremes are NaN where anything is, and take no memory, as a mask would.
    if not readable or not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        raise ValueError(
            f"{key} in {name} holds NaN, infinite values or no floating-point numbers ({tensor.dtype}); the "
            f"checkpoint is damaged."
        )


def check_loaded(model: Any, info: dict[str, Any], name: str, *, any_size: bool) -> None:
    """Whether a full checkpoint fits its config, and its SAEs are numbers."""
    if not any_size and (found := sorted(info["mismatched_keys"])):
        key, shape, expected = found[0]
        raise ValueError(f"{key} in {name} has shape {tuple(shape)}; its config asks for {tuple(expected)}.")
    for key, tensor in model.saes.state_dict().items():
        if tensor.device.type != "meta":
            check_values(f"saes.{key}", tensor, name)
