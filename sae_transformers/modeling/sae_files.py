"""One sparse autoencoder as a folder or a Hub repository: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .configuration_sae import SparseAutoencoderConfig
from .repository_files import HUB_OPTIONS, check_values, check_writable, read_adapter, write_whole

FORMAT = "sae_transformers sparse autoencoder"
PLACE = ("layer", "site", "hook", "hook_out")


class SaeFilesMixin:
    """Saving and loading of `SparseAutoencoder` by itself."""

    if TYPE_CHECKING:
        config: Any

        def __getattr__(self, name: str) -> Any: ...

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `model.safetensors` and `config.json` to a folder, each whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        check_writable(save_directory)
        folder = Path(save_directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        part = folder / f"{SAFE_WEIGHTS_NAME}.part"
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(folder / SAFE_WEIGHTS_NAME)
        text = json.dumps({"format": FORMAT, "version": 1, **self.config.to_dict()}, indent=2)
        write_whole(folder / CONFIG_NAME, text + "\n")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """Read what `save_pretrained` wrote.

        Args:
            name: a folder or a Hub id.
            dtype: of its parameters; as stored by default.
            options: `layer` and `site`, or `hook` (and `hook_out`), put the SAE at another place than its files say;
                `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download` are the Hub's.

        Raises:
            ValueError: the files are damaged, not safetensors, of another format, or do not fit each other.
            OSError: nothing is there.
            TypeError: an unknown option.
        """
        if unknown := sorted(set(options) - set(HUB_OPTIONS) - set(PLACE)):
            known = ", ".join((*PLACE, *HUB_OPTIONS))
            raise TypeError(f"Options are {known}. Received: {', '.join(unknown)}.")
        hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        values = _read_config(str(name), hub)
        if any(options.get(key) is not None for key in PLACE):
            values = {key: value for key, value in values.items() if key not in PLACE}
            values.update({key: options[key] for key in PLACE if options.get(key) is not None})
        config = SparseAutoencoderConfig.from_dict(values)
        tensors = read_adapter(str(name), hub)
        sae: Any = cls(config, dtype=dtype or next(iter(tensors.values())).dtype)  # pyright: ignore
        _fill(sae, tensors, str(name))
        return sae


def _read_config(name: str, hub: dict[str, Any]) -> dict[str, Any]:
    path = cached_file(name, CONFIG_NAME, **hub)
    if path is None:
        raise OSError(f"{name} holds no {CONFIG_NAME}.")
    try:
        values = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Download or save it again.") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(
            f"{name} does not hold an SAE that this library saved: its {CONFIG_NAME} has no `format` of {FORMAT!r}."
        )
    version = values.pop("version", None)
    if version != 1:
        raise ValueError(f"{name} has format version {version!r}; this release reads 1. Update sae-transformers.")
    return values


@torch.no_grad()
def _fill(sae: Any, tensors: Mapping[str, Tensor], name: str) -> None:
    own = sae.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise ValueError(f"The SAE in {name} does not fit its config: missing {missing}.")
    if unexpected := sorted(set(tensors) - set(own)):
        raise ValueError(f"The SAE in {name} does not fit its config: unexpected {unexpected}.")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{key} in {name} has shape {tuple(tensor.shape)}; its config asks for {tuple(own[key].shape)}."
            )
        check_values(key, tensor, name)
    sae.load_state_dict(tensors)
