"""Damaged, lying and hostile checkpoints: a clear error or a working SAE, no code run, no memory that the file is not
large enough for."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_transformers import SparseAutoencoder
from tests.modeling.conversion.families import FAMILIES, D, F

SOME, MANY = 60, 1000
HEADROOM = 2**30  # of address space, for checkpoints of a few kilobytes
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
        import numpy as np

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


def gone(root: Path, chance: random.Random, trap: Path) -> None:
    file = chance.choice([*weight_files(root), *files_of(root, ".json")])
    file.unlink()
    if chance.random() < 0.5:
        file.mkdir()
    elif chance.random() < 0.5:
        file.write_bytes(b"")


MUTATIONS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    truncated, flipped, flipped, tensors_changed, tensors_changed, config_lies, config_lies, hostile, bomb, gone,
)  # fmt: skip


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Allocations that a file of a few kilobytes cannot ask for fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(family: str, seed: int, folder: Path) -> str:
    """One mutation; what came of it."""
    chance = random.Random(f"{family} {seed}")
    root, trap = folder / str(seed), folder / f"trap-{seed}"
    path = FAMILIES[family](root)
    mutation = chance.choice(MUTATIONS)
    mutation(root, chance, trap)
    try:
        with memory_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = SparseAutoencoder.from_pretrained(path, dtype=torch.float32)
            output = sae(torch.ones(2, sae.config.d_in))
            assert all(bool(value.isfinite().all()) for value in sae.state_dict().values()), (
                f"{mutation.__name__}, {seed}"
            )
            # Finite weights may still be as large as float32 goes, so the output may overflow; it must be there.
            assert output.latents.shape == (2, sae.config.d_sae)
            outcome = "loaded"
    except (ValueError, TypeError, OSError) as error:
        assert len(str(error)) > 10, f"{mutation.__name__}, {seed}: {error!r}"
        outcome = "refused"
    assert not trap.exists(), f"{mutation.__name__}, {seed}: code was run"
    shutil.rmtree(root)
    return outcome


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_itself_loads(family, tmp_path):
    sae = SparseAutoencoder.from_pretrained(FAMILIES[family](tmp_path), dtype=torch.float32)
    output = sae(torch.randn(5, D, generator=torch.Generator().manual_seed(0)))
    assert output.reconstruction.isfinite().all() and (output.latents != 0).any()
    assert (sae.config.d_in, sae.config.d_sae) == (D, F)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("family", FAMILIES)
def test_some_mutations(family, tmp_path):
    outcomes = [check(family, seed, tmp_path) for seed in range(SOME)]
    assert outcomes.count("refused") > SOME / 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("family", FAMILIES)
def test_many_mutations(family, tmp_path):
    outcomes = [check(family, seed, tmp_path) for seed in range(SOME, SOME + MANY)]
    assert outcomes.count("refused") > MANY / 3 and "loaded" in outcomes
