"""Results of the parts of a long measurement, kept as they come, so that a stopped run goes on with the next part."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..latents.output_files import whole_file
from ..latents.progress import Keep, keep_nothing

WORD = 8  # bytes that are summed as one number
FIRST = 2048  # bytes of a tensor
SYNC_SECONDS = 2.0  # of parts that a machine which goes down may lose; a process that is killed loses none


class Journal:
    """A file with a line a part that is done; a line that was cut off does not count.

    Lines are only ever added, so that of two runs that write to one file, neither takes from the other.

        journal = Journal("steering.partial.jsonl", {"model": sha256, "versions": versions()})
        journal.result(["prompt 3", 0.2], measure)  # measures, or reads what an earlier run measured
        journal.tensors(["texts 0 to 99"], encode)  # the same of tensors, in files beside it

    Args:
        path: of the file; made with the first part.
        about: what all parts depend on, as JSON: model, data, versions. A file about something else begins anew.

    `found` is the number of parts that were there. `folder` holds the files of tensors, and is deleted with the file.
    """

    def __init__(self, path: str | os.PathLike, about: Any) -> None:
        self.path, self._about = Path(path), _key(about)
        self.folder = self.path.with_suffix(".parts")
        self._synced = -SYNC_SECONDS
        self._parts = self._read()
        self.found = len(self._parts)

    def _first_line(self) -> bytes:
        return (json.dumps(["about", self._about]) + "\n").encode()

    def _read(self) -> dict[str, Any]:
        if not self._is_ours():
            return {}
        parts: dict[str, Any] = {}
        for line in self.path.read_bytes().split(b"\n")[1:-1]:
            try:
                name, value = json.loads(line)
            except (ValueError, TypeError):  # damaged: measured again
                continue
            parts[name] = value
        return parts

    def _is_ours(self) -> bool:
        """Whether there is a file, about the same."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            return file.readline() == self._first_line()

    def _cut_off(self, file: RawIOBase) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

    def result(self, what: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, JSON, or gave before.

        Args:
            what: everything that this part depends on beside `about`, as JSON.
        """
        key = _key(what)
        if key not in self._parts:
            self._append(key, make())
        return self._parts[key]

    def tensors(self, what: Any, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same of tensors, by name, which come back on the CPU: each part in a file of its own, whose hash is in
        the line."""
        key = _key(what)
        file, known = self.folder / f"{key[:32]}.safetensors", self._parts.get(key)
        if known is not None and (found := _load(file, known)) is not None:
            return found
        made = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in make().items()}
        data = save(made)
        with whole_file(file) as draft:
            draft.write_bytes(data)
        self._append(key, hashlib.sha256(data).hexdigest())
        return made

    def _append(self, key: str, value: Any) -> None:
        if not self._is_ours():
            with whole_file(self.path) as draft:
                draft.write_bytes(self._first_line())
        with self.path.open("a+b", buffering=0) as file:
            if self._cut_off(file):
                file.truncate(file.seek(0) + len(file.read().rpartition(b"\n")[0]) + 1)
            file.write((json.dumps([key, value]) + "\n").encode())  # in one piece
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(file.fileno())
                self._synced = time.monotonic()
        self._parts[key] = json.loads(json.dumps(value))  # as it will be read: tuples are lists

    def remove(self) -> None:
        """Delete the file, and those of tensors: what they were for is done."""
        remove_journal(self.path)


def remove_journal(path: Path) -> None:
    """Delete a journal's file, and those of tensors, if they are there."""
    shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
    path.unlink(missing_ok=True)


class Watch(NamedTuple):
    """Who looks on while something long is measured. report: called with numbers of rows that are done. journal: has
    the parts that were done before, and gets the others."""

    report: Callable[[int], object] | None = None
    journal: Journal | None = None

    @property
    def keep(self) -> Keep:
        """`Journal.tensors`, or what keeps nothing."""
        return keep_nothing if self.journal is None else self.journal.tensors

    def done(self, count: int) -> None:
        """Tell who looks on."""
        if self.report is not None:
            self.report(count)


UNWATCHED = Watch()


def result_of(journal: Journal | None, what: Callable[[], Any], make: Callable[[], Any]) -> Any:
    """`journal.result`, or simply what `make` gives where there is no journal."""
    return make() if journal is None else journal.result(what(), make)


def fingerprint(module: nn.Module, *, without: Collection[str] = ()) -> str:
    """sha256 over names, shapes and bytes of a module's tensors, but for those that are left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def quick_fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes, first and last bytes and exact sums of the bit patterns of a module's tensors: for a
    whole base model, whose bytes take long to hash. Each is read once, where it is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:  # of a model that is partly on disk
            continue
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if data.storage_offset() % WORD:
            data = data.clone()
        words = data[: len(data) // WORD * WORD].view(torch.int64)
        digest.update(str(int(words.sum())).encode())
        digest.update(torch.cat([data[:FIRST], data[-WORD:]]).cpu().numpy().data)
    return digest.hexdigest()


def _load(file: Path, digest: str) -> dict[str, Tensor] | None:
    """What is in a file of this hash; None where there is none."""
    try:
        data = file.read_bytes()
        return load(data) if hashlib.sha256(data).hexdigest() == digest else None
    except (OSError, SafetensorError):
        return None


def _key(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
