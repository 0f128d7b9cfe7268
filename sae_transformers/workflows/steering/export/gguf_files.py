"""Control vectors as GGUF files, in the layout of llama.cpp and repeng.

`general.architecture` is `controlvector`; a tensor `direction.N` (d_model,) of float32 for each block N that is
steered. llama.cpp adds it to what block N returns, counted from 0, and holds none for block 0
(`llama_adapter_cvec` in src/llama-adapter.cpp, `common_control_vector_load` in common/common.cpp; repeng's
`ControlVector.export_gguf`, https://github.com/vgel/repeng).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....latents.optional_packages import needs
from ....latents.output_files import whole_file
from ....modeling.plain_files import check_plain

ARCHITECTURE = "controlvector"
VERSIONS = (2, 3)
# A value's type -> how `struct` reads it; 8 is a text and 9 a list.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
FLOAT32 = 0  # type of a tensor
ALIGNMENT = 32  # bytes
# Real ones hold three or four keys and a tensor a block.
MAX_ENTRIES, MAX_TEXT_BYTES = 2**12, 2**16


class ControlVectorFile(NamedTuple):
    """directions: index of the block behind which it is added, from 1 -> (d_model,), float32. model_hint: the model
    type that it was made for, as `llama`; empty where the file does not say."""

    directions: dict[int, Tensor]
    model_hint: str


def write_control_vector(path: str | os.PathLike, directions: Mapping[int, Tensor], model_hint: str) -> None:
    """Write a control vector, whole or not at all, and see that it is read as it was.

    Args:
        path: the file.
        directions: index of the block, from 1 -> (d_model,).
        model_hint: the model's type.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: a direction for block 0, which the format cannot say.
        OSError: the file cannot be written.
    """
    with needs("Writing a control vector", "gguf", "gguf"):
        from gguf import GGUFWriter
    if 0 in directions:
        raise ValueError(
            "A GGUF control vector acts behind blocks 1, 2, ...: llama.cpp and repeng hold none for block 0. Expected "
            "layers from 1 on, or to='baked_bias'. Received: layer=0."
        )
    with whole_file(Path(path)) as draft:
        writer = GGUFWriter(draft, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer in sorted(directions):
            writer.add_tensor(f"direction.{layer}", directions[layer].detach().cpu().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        stored = read_control_vector(draft).directions
        if any(not torch.equal(stored[layer], directions[layer].cpu().float()) for layer in directions):
            raise OSError(f"{os.fspath(path)} was not written as it should be; is the disk full?")


def read_control_vector(path: str | os.PathLike) -> ControlVectorFile:
    """Read a control vector. Nothing is allocated before the file is known to hold it; gguf need not be installed.

    Raises:
        ValueError: it is no plain file, damaged, or holds something else than float32 directions.
        OSError: it is not there, or cannot be read.
    """
    name = os.fspath(path)
    with check_plain(path).open("rb") as file:
        try:
            return _read(file, name, Path(path).stat().st_size)
        except struct.error:
            raise ValueError(f"{name} is damaged or cut short. Download or save it again.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is damaged: {error}. Download or save it again.") from None


def _read(file: BinaryIO, name: str, size: int) -> ControlVectorFile:
    magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{name} is no GGUF file. Expected the first bytes b'GGUF'. Received: {magic!r}.")
    version, tensors, keys = _unpack(file, "IQQ")
    if version not in VERSIONS:
        raise ValueError(f"{name} has GGUF version {version}. Expected one of {', '.join(map(str, VERSIONS))}.")
    if max(tensors, keys) > MAX_ENTRIES:
        raise ValueError(
            f"{name} is no control vector: expected at most {MAX_ENTRIES} keys and tensors. "
            f"Received: {keys} keys, {tensors} tensors."
        )
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = _text(file, name)
        values[key] = _value(file, name, *_unpack(file, "I"))
    architecture = values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{name} holds no control vector. Expected general.architecture={ARCHITECTURE!r}. "
            f"Received: {architecture!r}."
        )
    places = dict(_place(file, name) for _ in range(tensors))  # layer -> (width, offset)
    if not places:
        raise ValueError(f"{name} holds no direction. Expected tensors direction.1, direction.2, ... Received: none.")
    if len(places) < tensors:
        raise ValueError(f"{name} holds two directions for one layer. Expected one. Received: {tensors} tensors.")
    if len(widths := {width for width, _ in places.values()}) > 1:
        raise ValueError(f"{name} holds directions of several widths. Received: {sorted(widths)}.")
    alignment = values.get("general.alignment", ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 0 < alignment <= MAX_TEXT_BYTES:
        raise ValueError(f"{name} is damaged: general.alignment={alignment!r}. Expected a number of bytes.")
    start = -(-file.tell() // alignment) * alignment
    directions: dict[int, Tensor] = {}
    for layer in sorted(places):
        width, offset = places[layer]
        if start + offset + 4 * width > size:
            raise ValueError(
                f"{name} is damaged or cut short: direction.{layer} would end at byte {start + offset + 4 * width:,} "
                f"of {size:,}. Download or save it again."
            )
        file.seek(start + offset)
        found = torch.from_numpy(np.frombuffer(file.read(4 * width), "<f4").astype(np.float32))
        if not bool(found.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite numbers in direction.{layer}. Expected finite ones.")
        directions[layer] = found
    hint = values.get(f"{ARCHITECTURE}.model_hint", "")
    return ControlVectorFile(directions, hint if isinstance(hint, str) else "")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _text(file: BinaryIO, name: str) -> str:
    (length,) = _unpack(file, "Q")
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"{name} is no control vector, or damaged: it holds a text of {length:,} bytes.")
    found = file.read(length)
    if len(found) < length:
        raise ValueError(f"{name} is damaged or cut short. Download or save it again.")
    return found.decode("utf-8")


def _value(file: BinaryIO, name: str, kind: int) -> Any:
    if kind == TEXT:
        return _text(file, name)
    if kind in NUMBERS:
        return _unpack(file, NUMBERS[kind])[0]
    if kind == LIST:
        inner, count = _unpack(file, "IQ")
        if count > MAX_ENTRIES or inner == LIST:
            raise ValueError(f"{name} is no control vector, or damaged: it holds a list of {count:,} values.")
        return [_value(file, name, inner) for _ in range(count)]
    raise ValueError(f"{name} is damaged: a value has the unknown type {kind}. Download or save it again.")


def _place(file: BinaryIO, name: str) -> tuple[int, tuple[int, int]]:
    """Layer, width and offset of the next tensor."""
    tensor = _text(file, name)
    (dimensions,) = _unpack(file, "I")
    if dimensions > 4:
        raise ValueError(f"{name} is damaged: {tensor!r} has {dimensions} dimensions. Download or save it again.")
    shape = _unpack(file, f"{dimensions}Q")
    kind, offset = _unpack(file, "IQ")
    match = re.fullmatch(r"direction\.([1-9][0-9]{0,5})", tensor)
    if match is None:
        raise ValueError(
            f"{name} is no control vector of llama.cpp. Expected tensors direction.1, direction.2, ... "
            f"Received: {tensor!r}."
        )
    if kind != FLOAT32 or len(shape) != 1 or not shape[0]:
        raise ValueError(
            f"{name} has a direction of another kind. Expected float32 (type 0) of one dimension. "
            f"Received: {tensor} of type {kind}, shape {shape}."
        )
    return int(match[1]), (shape[0], offset)
