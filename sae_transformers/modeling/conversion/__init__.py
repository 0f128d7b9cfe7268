"""Checkpoints of other libraries, read exactly. Not part of the remote code that a Hub repository receives."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import (
    circuit_tracer,
    cross_layer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    openai,
    qwen_scope,
    saelens,
    scar,
    selfreg,
    sparsify,
    torch_pairs,
)
from .checkpoint import Checkpoint
from .format import Converted, Format

FORMATS: tuple[Format, ...] = (
    saelens.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    circuit_tracer.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    llama_scope.FORMAT,
    llama_scope.DISTILLED_FORMAT,
    llamascopium.FORMAT,
    openai.FORMAT,
    qwen_scope.FORMAT,
    scar.FORMAT,
    selfreg.FORMAT,
    *torch_pairs.FORMATS,
    *cross_layer.FORMATS,
)


class SeveralSaes(ValueError):
    """A name that holds several SAEs.

    root: the folder or Hub id. ids: path of each in it -> name of its format.
    """

    def __init__(self, message: str, root: str, ids: Mapping[str, str]) -> None:
        super().__init__(message)
        self.root, self.ids = root, ids

    @property
    def one_object(self) -> list[str]:
        """The paths where all are layers of one cross-layer transcoder or crosscoder, in their order; else none."""
        forms, folders = set(self.ids.values()), {path.rpartition("/")[0] for path in self.ids}
        if len(folders) != 1 or not forms <= {form.name for form in cross_layer.FORMATS}:
            return []
        return sorted(self.ids, key=lambda path: int(re.findall(r"\d+", path)[-1]))


def recognise(checkpoint: Checkpoint) -> Format | None:
    """The format of one SAE's files, None where no format knows them."""
    return next((form for form in FORMATS if form.recognise(checkpoint)), None)


def sae_ids(checkpoint: Checkpoint) -> dict[str, str]:
    """Path -> name of a format, of every SAE that a repository seems to hold, by the names of its files alone."""
    found: dict[str, str] = {}
    prefix = f"{checkpoint.part}/" if checkpoint.part else ""
    for form in FORMATS:
        for path in form.ids(checkpoint.files):
            found.setdefault(prefix + path if path else checkpoint.part, form.name)
    return dict(sorted(found.items()))


def convert(name: str, part: str, hub: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Converted, str]:
    """Read one SAE of any known format; gives the format's name too.

    Args:
        name: a folder, a file or a Hub id.
        part: the SAE inside it, "" where it holds one only.
        hub: options of the Hub.
        given: fields of the config that the caller states; of a name that found them also `base_model`, for where
            the files do not say it, `format`, which they must have, and `known_as`, for the metadata.

    Raises:
        ValueError: no format knows the files, several SAEs are there, or the files are damaged.
        OSError: nothing is there.
    """
    stated = {key: value for key, value in given.items() if key not in ("base_model", "format", "known_as")}
    checkpoint = Checkpoint(name, part, hub, stated)
    if not checkpoint.files:
        ids = list(sae_ids(checkpoint.within("")))
        close = difflib.get_close_matches(part, ids, n=3, cutoff=0.3) or ids[:3]
        raise OSError(f"{checkpoint.root} holds nothing at {part!r}; it holds {', '.join(close) or 'no SAE'}.")
    form = recognise(checkpoint)
    if form is None:
        forms = {path: form for path, form in sae_ids(checkpoint).items() if path != checkpoint.part}
        ids = list(forms)
        if len(ids) == 1:
            return convert(checkpoint.root, ids[0], hub, given)
        if ids:
            shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
            raise SeveralSaes(
                f"{checkpoint.label} holds several SAEs: {shown}. Name one with `sae_id=`.", checkpoint.root, forms
            )
        raise ValueError(
            f"{checkpoint.label} is of no format that is known ({', '.join(form.name for form in FORMATS)}). "
            f"It holds {', '.join(checkpoint.files[:8])}."
        )
    if given.get("format", form.name) != form.name:
        raise ValueError(
            f"The files at {checkpoint.label} must be of the format {given['format']}, says the registry that names "
            f"them. Received: files of the format {form.name}. Name the repository itself to read them as they are."
        )
    converted = form.read(checkpoint)
    converted.values.setdefault("metadata", {})
    origin = {"format": form.name, "source": checkpoint.label}
    if given.get("base_model"):
        origin["base_model"] = given["base_model"]
    converted.values["metadata"] = {**origin, **converted.values["metadata"], **given.get("known_as", {})}
    for message in converted.warnings:
        warnings.warn(f"{checkpoint.label}: {message}", stacklevel=4)
    return converted, form.name


__all__ = ["FORMATS", "Checkpoint", "Converted", "Format", "Tensor", "convert", "recognise", "sae_ids"]
