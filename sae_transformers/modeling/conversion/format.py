"""What a foreign format is, and what reading one gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint


@dataclass
class Converted:
    """An SAE in our terms.

    Args:
        values: fields of `SparseAutoencoderConfig`. What the format says about the model goes into `metadata`:
            `base_model` (id), `context_length`, `prepend_bos`, `processing` (what another library did to the model).
        tensors: by the names of `SparseAutoencoder`; views of the file where nothing has to be computed.
        warnings: what a user must know before trusting the numbers.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    warnings: list[str] = field(default_factory=list)


# Of an SAE's config and tensors, into a folder.
Writer = Callable[[Any, Mapping[str, Tensor], Path], None]


class Format(NamedTuple):
    """A foreign checkpoint format.

    Args:
        name: as users know it.
        weights: pattern of its weight file's path, relative to the SAE's folder: `sae_weights\\.safetensors`.
        recognise: whether the files of one SAE are of this format; looks at names and configs, not at weights.
        read: its config and tensors.
        write: the way back, where there is one. Raises ValueError for what the format cannot say.
        one_file: an SAE is one file, and a folder may hold many.
    """

    name: str
    weights: str
    recognise: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], Converted]
    write: Writer | None = None
    one_file: bool = False

    def ids(self, files: list[str]) -> list[str]:
        """Paths of the SAEs of this format that a repository seems to hold."""
        found = (re.fullmatch(f"(?:(?P<folder>.*)/)?(?:{self.weights})", file) for file in files)
        return [m.group(0) if self.one_file else m["folder"] or "" for m in found if m]


# -- what several formats share --------------------------------------------------------------------------------------


def need(tensors: Mapping[str, Tensor], names: tuple[str, ...], where: str) -> None:
    """Raises ValueError unless all of `names` are there."""
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(tensors)) or 'nothing'}.")


def only(tensors: Mapping[str, Tensor], names: tuple[str, ...], where: str) -> None:
    """Raises ValueError where there is more than `names`: what is not understood must not be dropped in silence."""
    if extra := sorted(set(tensors) - set(names)):
        raise ValueError(f"{where} holds {', '.join(extra)}, which this format does not know.")


def matrix(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """A matrix by name."""
    need(tensors, (name,), where)
    if tensors[name].ndim != 2:
        raise ValueError(f"{name} in {where} must be a matrix. Received: shape {tuple(tensors[name].shape)}.")
    return tensors[name]


def number(values: Mapping[str, Any], name: str, where: str, *, kind: type = float, default: Any = ...) -> Any:
    """A finite number of a config."""
    value = values.get(name, default)
    if value is default and default is not ...:
        return default
    whole = kind is int and isinstance(value, float) and value.is_integer()
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (kind is int and not isinstance(value, int) and not whole)
    ):
        raise ValueError(f"`{name}` in {where} must be a number ({kind.__name__}). Received: {name}={value!r}.")
    if not -1e30 < value < 1e30:
        raise ValueError(f"`{name}` in {where} must be a finite number. Received: {name}={value!r}.")
    return kind(value)


def flag(values: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    """True or False of a config."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` in {where} must be true or false. Received: {name}={value!r}.")
    return value


def text(values: Mapping[str, Any], name: str, where: str) -> str | None:
    """A text of a config, None where there is none."""
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{name}` in {where} must be a text. Received: {name}={value!r}.")
    return value or None


def full(value: Tensor | float, like: Tensor, d_sae: int) -> Tensor:
    """One number for every latent, (d_sae,), with dtype of `like`."""
    return torch.full((d_sae,), float(value), dtype=like.dtype)


TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_heads",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
}
SITE_NAMES = {site: hook for hook, site in TRANSFORMER_LENS.items()}


def place_of_hook(hook: str | None) -> dict[str, Any]:
    """`layer` and `site` of a TransformerLens hook name, as `blocks.12.hook_resid_post`; empty where it has no
    counterpart in a Hugging Face model."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    site = TRANSFORMER_LENS.get(match[2]) if match else None
    return {"layer": int(match[1]), "site": site} if match and site else {}


def place_as_text(hook: str | None) -> str | None:
    """The same as one string, for `hook_out`: `layers.12.mlp_out`."""
    place = place_of_hook(hook)
    return f"layers.{place['layer']}.{place['site']}" if place else None
