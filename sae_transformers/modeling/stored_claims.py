"""What a repository's config claims, held against the headers of its weights before memory is taken.

A config of a few bytes may ask for any size, and what a checkpoint lacks is made new at that size.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .configuration_sparse_autoencoder import SparseAutoencoderConfig
from .plain_files import opened_tensors
from .sparse_autoencoder import SparseAutoencoder

# What a model may hold that its file does not: as much again, for new heads and for buffers that are computed.
TIMES, NUMBERS = 2, 2**24
MAX_NAME = 1000  # characters
SAE = re.compile(r"saes\.(\d+)\.(.+)")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


class Stored(NamedTuple):
    """The tensors of a repository: their shapes by name. any_size: shapes may differ from what the config asks."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    any_size: bool = False

    @property
    def numbers(self) -> int:
        return sum(_numbers(shape) for shape in self.shapes.values())


def stored_shapes(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors files, by name, from their headers.

    Raises:
        ValueError: a file is damaged, or a name longer than any.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with opened_tensors(file) as tensors:
            names = tensors.keys()
            if (longest := max(map(len, names), default=0)) > MAX_NAME:
                raise ValueError(f"{file} is damaged: a tensor's name has {longest:,} characters.")
            shapes.update((name, tuple(tensors.get_slice(name).get_shape())) for name in names)
    return shapes


def check_sae_claims(entries: Sequence[SparseAutoencoderConfig], stored: Stored, *, may_lack: bool = False) -> None:
    """Raises ValueError where a config's SAEs are not those that are stored: other numbers, names or shapes.

    Args:
        may_lack: whether all SAEs may be new, where none is stored.
    """
    found = {int(match[1]) for name in stored.shapes if (match := SAE.fullmatch(name))}
    if beyond := sorted(found - set(range(len(entries)))):
        raise ValueError(
            f"{stored.name} holds the weights of SAE {', '.join(map(str, beyond[:5]))}, which its config.json does "
            f"not have: they would be left out. Received: `saes` with {len(entries)} entries."
        )
    missing, unexpected = [], []
    for number, entry in enumerate(entries):
        expected = _shapes(entry, number, stored.name)
        here = {name for name in stored.shapes if name.startswith(f"saes.{number}.")}
        missing += sorted(set(expected) - here) if found or not may_lack else []
        unexpected += sorted(here - set(expected))
        for name in sorted(here & set(expected)):
            if not stored.any_size:
                _check_shape(name, stored, expected[name])
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint in {stored.name} does not fit its config: missing {missing or 'none'}, unexpected "
            f"{unexpected or 'none'}."
        )


def _shapes(entry: SparseAutoencoderConfig, number: int, where: str) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):  # nothing is allocated for sizes that a config merely claims
            made = SparseAutoencoder(entry)
    except RuntimeError as error:
        raise ValueError(
            f"SAE {number} in config.json of {where} has impossible sizes. Received: d_in={entry.d_in!r}, "
            f"d_sae={entry.d_sae!r}, d_out={entry.d_out!r} ({error})."
        ) from error
    return {f"saes.{number}.{name}": tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def check_layer_claims(config: Any, stored: Stored) -> None:
    """Raises ValueError where a base's config, or a part of it, claims more blocks than weights are stored of: they
    would be made one after the other, without an end."""
    blocks: dict[str, set[str]] = {}
    for name in stored.shapes:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                blocks.setdefault(".".join(parts[:place]), set()).add(part)
    most = max(map(len, blocks.values()), default=0)
    if most < 2 or getattr(config, "num_hidden_groups", None) is not None:  # blocks may share their weights (ALBERT)
        most = len(stored.shapes)
    for part in _configs(config):
        for name in LAYERS:
            value = getattr(part, name, None)
            if isinstance(value, int) and value > most:
                raise ValueError(
                    f"`{name}` in config.json of {stored.name} asks for more blocks than its weights have, which is "
                    f"{most}. Received: {name}={value!r}."
                )


def check_head_claims(config: Any, stored: Stored) -> None:
    """Raises ValueError where a new head would be large, and nothing stored is of its size."""
    width = getattr(config.get_text_config(), "hidden_size", None) or 1
    hidden = (config.feature_head or {}).get("hidden_size")
    claims = {"num_labels": config.num_labels, "feature_head.hidden_size": hidden}
    sizes = {shape[0] for shape in stored.shapes.values() if shape}
    for name, value in claims.items():
        if isinstance(value, int) and value * width > NUMBERS and value not in sizes:
            raise ValueError(
                f"`{name}` in config.json of {stored.name} asks for a larger head than its weights have. Received: "
                f"{name}={value!r}."
            )


def _configs(config: Any) -> list[Any]:
    inner = [value for value in vars(config).values() if hasattr(value, "model_type")]
    return [config, *(part for value in inner for part in _configs(value))]


# -- while transformers loads ----------------------------------------------------------------------------------------

_LOADING: contextvars.ContextVar[Stored | None] = contextvars.ContextVar("loading", default=None)


@contextlib.contextmanager
def held_against(stored: Stored) -> Iterator[None]:
    """Hold what a model's constructor makes on the meta device against what is stored: see `check_built`."""
    token = _LOADING.set(stored)
    try:
        yield
    finally:
        _LOADING.reset(token)


def check_built(model: nn.Module) -> None:
    """Raises ValueError where a model that has no memory yet would take more than what is being loaded can fill.

    Names differ where a family is stored in other pieces than it has; so shapes are compared where names are equal,
    and sums in any case.
    """
    stored = _LOADING.get()
    if stored is None:
        return
    tensors = {id(t): (name, t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    if any(tensor.device.type != "meta" for _, tensor in tensors.values() if tensor.numel() > NUMBERS):
        return  # another loader has its own way
    for name, tensor in tensors.values():
        if name in stored.shapes and not stored.any_size and tensor.numel() != _numbers(stored.shapes[name]):
            _check_shape(name, stored, tuple(tensor.shape))
    built = sum(tensor.numel() for _, tensor in tensors.values())
    if built > TIMES * stored.numbers + NUMBERS:
        name, largest = max(tensors.values(), key=lambda pair: pair[1].numel())
        raise ValueError(
            f"config.json of {stored.name} asks for {built:,} numbers, where its weights have {stored.numbers:,}. The "
            f"largest it asks for is {name}, {tuple(largest.shape)}."
        )


def _check_shape(name: str, stored: Stored, expected: tuple[int, ...]) -> None:
    if stored.shapes[name] != expected:
        raise ValueError(f"{name} in {stored.name} has shape {stored.shapes[name]}; its config asks for {expected}.")


def _numbers(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
