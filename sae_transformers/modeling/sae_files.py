"""One sparse autoencoder as a folder or a Hub repository: `config.json` and `model.safetensors`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .card_texts import base_line, code, hub_id, markdown
from .configuration_sae import SaeConfig
from .configuration_sparse_autoencoder import SparseAutoencoderConfig
from .decoder_norm import check_foldable, folded_decoder_norm
from .output_files import locked_folder, whole_file, write_whole
from .plain_files import read_json, written_tensors
from .repository_files import HUB_OPTIONS, MAPPED_FROM_BYTES, check_values, read_adapter
from .stored_annotations import StoredAnnotations
from .uploading import UPLOAD_OPTIONS, upload

FORMAT = "sae_transformers sparse autoencoder"
PLACE = ("layer", "site", "hook", "hook_out", "hooks_out")
# What some formats leave out.
GIVEN = ("k", "input_scale")
ALIGNMENT = 64  # bytes, of all memory that torch takes
CONVERSION = "sae_transformers.modeling.conversion"
CARD = """---
library_name: sae-transformers
tags:
- sparse-autoencoder
{base_line}---

# {name}

A sparse autoencoder that reads {place}: {d_in} -> {d_sae} latents, {activation}.

```python
{imports}

sae = SparseAutoencoder.from_pretrained("{repo}")
model = SaeForCausalLM.from_base("{base}", saes=[sae])
```
"""


Sae = TypeVar("Sae", bound="SaeFiles")


class SaeFiles(nn.Module):
    """Saving and loading of an SAE by itself; what it computes is in `SparseAutoencoder`."""

    def __init__(self, config: SparseAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.stored_annotations = StoredAnnotations()
        config.describe(self.stored_annotations)

    @property
    def annotations(self) -> Any:
        """What is known of the features in words, a `FeatureAnnotations`; None where there is nothing. `annotate` puts
        them there; `save_pretrained` keeps them, in `annotations.parquet`."""
        return self.stored_annotations.get()

    @annotations.setter
    def annotations(self, value: Any) -> None:
        self.stored_annotations.set(value)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `model.safetensors` and `config.json` to a folder, each whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(save_directory)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        text = json.dumps({"format": FORMAT, "version": 1, **self.config.to_dict()}, indent=2)
        with locked_folder(folder):
            weights = folder / SAFE_WEIGHTS_NAME
            with written_tensors(weights), whole_file(weights) as draft:
                save_file(tensors, draft, metadata={"format": "pt"})
            write_whole(folder / CONFIG_NAME, text + "\n")
            self.stored_annotations.save(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save as `save_pretrained` does and upload it in one commit, with a card; returns the commit's information.

        Args:
            repo_id: `user/name` on the Hub.
            options: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`.
        """
        if unknown := sorted(set(options) - set(UPLOAD_OPTIONS)):
            raise TypeError(f"Expected options among {', '.join(UPLOAD_OPTIONS)}. Received: {unknown[0]!r}.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_whole(Path(folder) / "README.md", CARD.format(repo=repo_id, **first_facts(self.config)))
            return upload(folder, repo_id, type(self).__name__, **options)

    @classmethod
    def from_pretrained(
        cls: type[Sae],
        name: str | os.PathLike,
        *,
        sae_id: str | None = None,
        dtype: torch.dtype | None = None,
        check_values: bool = True,
        fold_decoder_norm: bool = False,
        **options: Any,
    ) -> Sae:
        """Read an SAE: what `save_pretrained` wrote, one of a model with SAEs, or a checkpoint of another library.

        Its tensors are mapped from the file where their layout allows, so that memory is taken as they are used. The
        formats of other libraries are listed in docs/checkpoints.md and need this library installed; code that came
        with a repository reads its own format only.

        Args:
            name: a folder, a file, a Hub id, or a short name that `sae-transformers attach --list` shows.
            sae_id: the SAE inside it: a folder, a file, or its number in a model with several; `subfolder` is the
                same, and so is what follows a Hub id's second part or a model's folder.
            dtype: of its parameters; as stored by default.
            check_values: look for NaN and infinite weights, which reads all of the file.
            fold_decoder_norm: bring decoder rows to norm 1 and multiply latents, thresholds and `feature_max` by their
                norms, as SAELens' `fold_W_dec_norm` does: activations are those that Neuronpedia shows, the
                reconstruction stays. `config.metadata` says so. It takes memory for both matrices.
            options: `layer` and `site`, or `hook` (with `hook_out` or `hooks_out`), put the SAE at another place than
                its files say; `k` and `input_scale` are for checkpoints that leave them out; `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download` are the Hub's.

        Raises:
            ValueError: the files are damaged, of a format that is not known, could run code, or do not fit each other.
            OSError: nothing is there.
            TypeError: an unknown option.
        """
        if unknown := sorted(set(options) - set(HUB_OPTIONS) - set(PLACE) - set(GIVEN)):
            known = ", ".join((*PLACE, *GIVEN, *HUB_OPTIONS))
            raise TypeError(f"Options are {known}. Received: {', '.join(unknown)}.")
        options = {key: value for key, value in options.items() if value is not None}
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        if sae_id is not None:
            hub["subfolder"] = "/".join(part for part in (hub.get("subfolder"), sae_id) if part)
        given = {key: options[key] for key in GIVEN if key in options}
        name = _found(str(name), hub, given)
        values = _read_config(name, hub)
        of_sae: tuple[dict[str, Any], int] = (hub, 0)
        foreign = False
        if values is None and (of_model := _read_from_model(name, hub)) is not None:
            values, tensors = of_model
            of_sae = {key: value for key, value in hub.items() if key != "subfolder"}, int(hub.get("subfolder") or 0)
        elif values is None:
            foreign = True
            values, tensors = _read_foreign(name, hub, given)
        else:
            if unused := set(given) & set(GIVEN):
                raise TypeError(f"{name} says all that is needed. Received: {', '.join(unused)}.")
            tensors = read_adapter(name, hub)
        if place := {key: options[key] for key in PLACE if key in options}:
            values = {key: value for key, value in values.items() if key not in PLACE} | place
        config = SparseAutoencoderConfig.from_dict(values)
        with torch.device("meta"):  # nothing is allocated for sizes that a config merely claims
            sae = cls(config)
        if fold_decoder_norm:
            check_foldable(config, name)
        _fill(sae, tensors, name, dtype, check_values)
        if fold_decoder_norm:
            config, folded = folded_decoder_norm(config, sae.state_dict())
            with torch.device("meta"):
                sae = cls(config)
            _fill(sae, folded, name, None, check=False)
        if not foreign or Path(name).is_dir():
            sae.stored_annotations.point(name, *of_sae)
        return sae


def _found(name: str, hub: dict[str, Any], given: dict[str, Any]) -> str:
    """The folder, file or Hub id behind a name; what it says about the SAE inside goes into `hub` and `given`."""
    if Path(name).exists():
        return name
    if Path(name).name.isdigit() and (Path(name).parent / CONFIG_NAME).is_file():  # of a model with several
        hub["subfolder"] = Path(name).name
        return str(Path(name).parent)
    if name.startswith((".", "/", "~")) or "\\" in name:  # no Hub id begins so
        raise FileNotFoundError(
            f"There is no such folder or file. Received: {name!r}, from {str(Path.cwd())!r}. "
            f"Give the path of an SAE, or a Hub id as 'owner/name'."
        )
    with contextlib.suppress(ModuleNotFoundError):  # code that came with a repository knows no releases
        names = importlib.import_module(f"{CONVERSION}.names")
        if (found := names.find_named(name)) is not None:
            given.update(found.given)
            name = found.place
    owner_and_name, inside = name.split("/")[:2], "/".join(name.split("/")[2:])
    if inside and not name.startswith((".", "/")):
        hub["subfolder"] = "/".join(part for part in (inside.strip("/"), hub.get("subfolder")) if part)
        name = "/".join(owner_and_name)
    return name


def _read_config(name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Our own config, None where the files are of another format."""
    values = _read_json_config(name, hub)
    if values is None or values.pop("format", None) != FORMAT:
        return None
    version = values.pop("version", None)
    if version != 1:
        raise ValueError(f"{name} has format version {version!r}; this release reads 1. Update sae-transformers.")
    return values


def _read_json_config(name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    if Path(name).is_file():
        return None
    path = cached_file(name, CONFIG_NAME, **hub, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    values = read_json(path)
    return values if isinstance(values, dict) else None


def _read_from_model(name: str, hub: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Config and tensors of an SAE of a model that this library saved; None where the files are something else."""
    number = hub.get("subfolder") or ""
    if number and not number.isdigit():
        return None
    whole = {key: value for key, value in hub.items() if key != "subfolder"}
    values = _read_json_config(name, whole)
    if values is None or values.get("model_type") != SaeConfig.model_type or not isinstance(values.get("saes"), list):
        return None
    n = len(values["saes"])
    if int(number or 0) >= n or (not number and n > 1):
        raise ValueError(
            f"{name} is a model with {n} SAEs; name one by its number, 0 to {n - 1}. Received: sae_id={number!r}."
            if n
            else f"{name} is a model without SAEs."
        )
    prefix = f"saes.{int(number or 0)}."
    return values["saes"][int(number or 0)], read_adapter(name, whole, prefix)


def _read_foreign(name: str, hub: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        conversion = importlib.import_module(CONVERSION)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sae_transformers"):
            raise
        raise ValueError(
            f"{name} does not hold an SAE that this library saved (its {CONFIG_NAME} has no `format` of {FORMAT!r}); "
            f"to read formats of others, `pip install sae-transformers`."
        ) from error
    converted, _ = conversion.convert(name, hub.get("subfolder", ""), hub, given)
    return converted.values, converted.tensors


def _own(tensor: Tensor) -> Tensor:
    """Large tensors stay mapped; small ones get memory of their own, whose alignment makes products repeat bit for
    bit, unless they have it."""
    is_large = tensor.numel() * tensor.element_size() >= MAPPED_FROM_BYTES
    return tensor if is_large or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@torch.no_grad()
def _fill(
    sae: SaeFiles, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, check: bool = True
) -> None:
    """Make `tensors` the parameters of an SAE without memory of its own, after every check."""
    own = sae.state_dict()
    if missing := sorted(set(own) - set(tensors) - {"feature_max"}):
        raise ValueError(f"The SAE in {name} does not fit its config: missing {missing}.")
    if unexpected := sorted(set(tensors) - set(own)):
        raise ValueError(f"The SAE in {name} does not fit its config: unexpected {unexpected}.")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{key} in {name} has shape {tuple(tensor.shape)}; its config asks for {tuple(own[key].shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{key} in {name} holds no floating-point numbers ({tensor.dtype}).")
        if check:
            check_values(key, tensor, name)
    dtype = dtype or tensors["W_dec"].dtype
    filled = {key: _own(tensor.to(dtype)) for key, tensor in tensors.items()}
    filled.setdefault("feature_max", torch.zeros(sae.config.d_sae, dtype=dtype))
    sae.load_state_dict(filled, assign=True)
    sae.requires_grad_(True)


def first_facts(config: SparseAutoencoderConfig) -> dict[str, Any]:
    """What a card says of an SAE."""
    named = hub_id(config.metadata.get("base_model"))
    return {
        "name": markdown(f"SAE at {config.read_at}") if config.placed else "SAE",
        # Not a line of the card above: that is no import of this file.
        "imports": "from sae_transformers import SaeForCausalLM, SparseAutoencoder",
        "place": code(config.read_at) if config.placed else "hidden states",
        "base_line": base_line(named, adapter=True),
        "base": named or "the base it was trained on",
        "d_in": config.d_in, "d_sae": config.d_sae, "activation": markdown(config.activation),
    }  # fmt: skip
