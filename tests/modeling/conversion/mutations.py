"""What a stranger, a bad disk or a mistake may do to a checkpoint. Nothing here hurts who loads it as this library
does: the only code is a call that makes a folder."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.modeling.conversion.families import D, F

LIES: tuple[Any, ...] = (
    None, "x", "", "blocks.99.hook_nothing", -1, 0, 1, 2.5, 1e9, 10**12, 10**400, float("nan"), float("inf"), True,
    False, [], [1, 2], {}, {"a": 1}, "float64", "none", "topk", "jumprelu", D, F,
)  # fmt: skip


class Hostile:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def files_of(root: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in suffixes)


def weight_files(root: Path) -> list[Path]:
    return files_of(root, ".safetensors", ".pt", ".pth", ".npz")


# -- mutations; each gets the folder, a source of chance and a path that must never come to exist --------------------


def truncated(root: Path, chance: random.Random, trap: Path) -> None:
    file = chance.choice([*weight_files(root), *files_of(root, ".json")])
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


def flipped(root: Path, chance: random.Random, trap: Path) -> None:
    """Bytes changed anywhere, mostly near the start or the end, where headers and directories are."""
    file = chance.choice(weight_files(root))
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 4, 32])):
        place = chance.choice([chance.randrange(len(data)), chance.randrange(min(400, len(data)))])
        data[place if chance.random() < 0.7 else -1 - place % 400] = chance.randrange(256)
    file.write_bytes(data)


def _spoil(tensors: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice([key for key, value in tensors.items() if isinstance(value, torch.Tensor)])
    tensor = tensors[name]
    kind = chance.randrange(10)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + chance.choice(["_", ".weight", "2"])] = tensors.pop(name)
    elif kind == 2:
        tensors["surprise"] = torch.zeros(3)
    elif kind == 3:
        tensors[name] = tensor.to(
            chance.choice([torch.int64, torch.bool, torch.float64, torch.uint8, torch.complex64])
        )
    elif kind == 4:
        tensors[name] = tensor.flatten()[:-1].clone() if tensor.numel() > 1 else torch.zeros(2, 2)
    elif kind == 5:
        tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor.reshape(1, -1).clone()
    elif kind == 6:
        tensors[name] = torch.zeros(0)
    elif tensor.is_floating_point():
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        tensors[name].view(-1)[chance.randrange(tensor.numel())] = [torch.nan, torch.inf, -torch.inf][kind - 7]


def tensors_changed(root: Path, chance: random.Random, trap: Path) -> None:
    file = chance.choice(weight_files(root))
    if file.suffix == ".safetensors":
        stored: dict[str, Any] = dict(load_file(file))
        _spoil(stored, chance)
        save_file(stored, file)
    elif file.suffix == ".npz":
        arrays: dict[str, Any] = {key: torch.from_numpy(array) for key, array in np.load(file).items()}
        _spoil(arrays, chance)
        np.savez(file, **{key: tensor.numpy() for key, tensor in arrays.items()})
    else:
        content = torch.load(file, weights_only=True)
        inner = content.get("weight", content)
        _spoil(inner, chance)
        torch.save(content, file)


def config_lies(root: Path, chance: random.Random, trap: Path) -> None:
    files = files_of(root, ".json")
    if not files:
        tensors_changed(root, chance, trap)
        return
    file = chance.choice(files)
    values = json.loads(file.read_text())
    places = [(values, key) for key in values]
    places += [(inner, key) for inner in values.values() if isinstance(inner, dict) for key in inner]
    inside, key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0:
        del inside[key]
    elif kind == 1:
        inside["surprise"] = chance.choice(LIES)
    else:
        inside[key] = chance.choice(LIES)
    text = json.dumps(values)
    if kind == 2:
        text = chance.choice(["", "{", "[]", "null", "[" * 5000, '{"a": ' * 3000, text[: len(text) // 2], "\udcff"])
    file.write_text(text, errors="surrogateescape")


def hostile(root: Path, chance: random.Random, trap: Path) -> None:
    """A pickle that would run code, in the place of the weights or hidden among them."""
    file = chance.choice(weight_files(root))
    if file.suffix in (".pt", ".pth") and chance.random() < 0.5:
        content = torch.load(file, weights_only=True)
        content["surprise"] = Hostile(trap)
        torch.save(content, file)
    elif chance.random() < 0.5:
        torch.save({"W_enc": Hostile(trap)}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(trap)))


def bomb(root: Path, chance: random.Random, trap: Path) -> None:
    """A small file that claims to hold much."""
    file = chance.choice(weight_files(root))
    size = 2**34
    if file.suffix == ".safetensors":
        header = json.dumps({"W_enc": {"dtype": "F32", "shape": [2**16, 2**16], "data_offsets": [0, size]}}).encode()
        length = chance.choice([len(header), 2**40, 2**63])
        file.write_bytes(length.to_bytes(8, "little") + header)
    elif file.suffix == ".npz":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
            claim = chance.choice(["(4194304,)", "(1073741824, 1024)", "(-1, 5)", "()"])
            header += f"{{'descr': '<f4', 'fortran_order': False, 'shape': {claim}, }}".ljust(117).encode() + b"\n"
            archive.writestr("W_enc.npy", header + bytes(2**24))
    else:
        content = torch.load(file, weights_only=True)
        inner = content.get("weight", content)
        name = chance.choice([key for key, value in inner.items() if isinstance(value, torch.Tensor)])
        inner[name] = torch.zeros(1).expand(2**17, 2**17)
        torch.save(content, file)
        if chance.random() < 0.5:  # and compressed
            with zipfile.ZipFile(file) as archive:
                entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for entry, data in entries.items():
                    archive.writestr(entry, data + bytes(2**22 if "/data/" in entry else 0))


def hung_on(root: Path, chance: random.Random, trap: Path) -> None:
    """A pickle whose objects carry more than their class has, or hold each other many times over."""
    file = chance.choice(weight_files(root))
    if file.suffix not in (".pt", ".pth"):
        swapped(root, chance, trap)
        return
    content = torch.load(file, weights_only=True)
    inner = content.get("weight", content)
    name = chance.choice([key for key, value in inner.items() if isinstance(value, torch.Tensor)])
    kind = chance.randrange(5)
    if kind == 0:
        inner[name].__dict__[chance.choice(["numel", "is_floating_point", "note"])] = "hidden"
    elif kind == 1:
        content = OrderedDict(content)
        content.__dict__[chance.choice(["get", "values", "note"])] = "hidden"
    elif kind == 2:
        nested: Any = [1]
        for _ in range(chance.randrange(4, 12)):
            nested = [nested] * 8
        content[chance.choice([*content, "surprise"])] = nested
    elif kind == 3:
        nested = 1
        for _ in range(chance.choice([3, 15, 17, 60])):
            nested = chance.choice([[nested], {"a": nested}, (nested,)])
        content[chance.choice([*content, "surprise"])] = nested
    else:
        weight = torch.nn.Parameter(inner[name], requires_grad=False)
        others = [weight, {1, 2}, b"bytes", torch.float16, 1j, {(1, 2): 3}, list(range(1000))]
        content[chance.choice([*content, "surprise"])] = chance.choice(others)
    torch.save(content, file)


def swapped(root: Path, chance: random.Random, trap: Path) -> None:
    """Two tensors under each other's names."""
    file = chance.choice(weight_files(root))
    content: dict[str, Any] = {}
    if file.suffix == ".safetensors":
        tensors = content = dict(load_file(file))
    elif file.suffix == ".npz":
        tensors = content = {key: torch.from_numpy(array) for key, array in np.load(file).items()}
    else:
        content = torch.load(file, weights_only=True)
        tensors = content.get("weight", content)
    names = [key for key, value in tensors.items() if isinstance(value, torch.Tensor)]
    one, other = chance.sample(names, 2) if len(names) > 1 else names * 2
    tensors[one], tensors[other] = tensors[other], tensors[one]
    if file.suffix == ".safetensors":
        save_file(content, file)
    elif file.suffix == ".npz":
        np.savez(file, **{key: tensor.numpy() for key, tensor in content.items()})
    else:
        torch.save(content, file)


def header_lies(root: Path, chance: random.Random, trap: Path) -> None:
    """Words of a header exchanged for others of their length; in a pickle, a byte of its program."""
    file = chance.choice(weight_files(root))
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        pairs = [(b'"F32"', b'"F64"'), (b'"F32"', b'"I32"'), (b'"F32"', b'"XYZ"'), (b"[40", b"[49"), (b"[12", b"[99")]
        pairs += [(b'"shape":[', b'"shape":{'), (b"data_offsets", b"data_offsetz"), (b"[0,", b"[9,"), (b":", b";")]
    elif file.suffix == ".npz":
        pairs = [(b"'<f4'", b"'<f8'"), (b"'<f4'", b"'<i4'"), (b"'<f4'", b"'|O8'"), (b"'<f4'", b"'zzz'")]
        pairs += [
            (b"(40,)", b"(-4,)"),
            (b"(40,)", b"(9,,)"),
            (b"(40,", b"((4,"),
            (b"False", b"True "),
            (b"'descr'", b"'dascr'"),
        ]
        pairs += [(b"}", b"{"), (b"NUMPY", b"NUMPX"), (b"NUMPY\x01", b"NUMPY\x09")]
    else:
        start = data.find(b"data.pkl") + 8
        place = start + chance.randrange(600)
        file.write_bytes(data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :])
        return
    old, new = chance.choice(pairs)
    file.write_bytes(data.replace(old, new, chance.choice([1, 2, -1])))


def gone(root: Path, chance: random.Random, trap: Path) -> None:
    file = chance.choice([*weight_files(root), *files_of(root, ".json")])
    file.unlink()
    if chance.random() < 0.5:
        file.mkdir()
    elif chance.random() < 0.5:
        file.write_bytes(b"")


MUTATIONS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    truncated, flipped, flipped, tensors_changed, tensors_changed, config_lies, config_lies, hostile, bomb, gone,
    hung_on, hung_on, swapped, header_lies, header_lies,
)  # fmt: skip
