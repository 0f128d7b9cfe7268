"""Harvest hidden states to a store: a folder, or any fsspec URL, of safetensors shards with an index.

index.json                  what was harvested; written before the first shard
shard-000000.safetensors    one for each block of rows; whole or absent
complete.json               number of tokens of each shard; written when all are there
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...latents.output_files import whole_file
from ...latents.texts import TextSource
from .blocks import Harvester, HarvestSettings, KeepTokens

FORMAT = "sae_transformers hidden states"
VERSION = 1


class Harvested(NamedTuple):
    """What is in a store after a harvest.

    n_tokens, n_shards: in the store. n_bytes: of the shards. complete: whether all shards are there.
    new_tokens: harvested by this process.
    """

    n_tokens: int
    n_shards: int
    n_bytes: int
    complete: bool
    new_tokens: int


class Store:
    """A folder or fsspec URL, into which files are put whole or not at all."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self.fs, self.root = url_to_fs(self.url)
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file of that name lies."""
        return f"{self.root.rstrip('/')}/{name}"

    def shards(self) -> list[str]:
        """Names of the shards that are there, in order."""
        self.fs.invalidate_cache()  # other processes write too
        try:
            entries = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = (entry.rstrip("/").rpartition("/")[2] for entry in entries)
        return sorted(name for name in names if name.startswith("shard-") and name.endswith(".safetensors"))

    def read_json(self, name: str) -> Any:
        """The value of a JSON file, None where there is none."""
        try:
            return json.loads(self.fs.cat_file(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} of {self.url} is no JSON: {error}. Harvest to another folder.") from None

    def differences(self, name: str, wanted: Mapping[str, Any]) -> str | None:
        """What the values of a JSON file are there and are wanted now, where they differ; None without the file.

        Args:
            wanted: values as JSON has them.
        """
        there = self.read_json(name)
        if there is None:
            return None
        flat, now = _flat(there), _flat(wanted)
        different = [key for key in {**now, **flat} if flat.get(key) != now.get(key)]
        return "; ".join(f"{key} is {flat.get(key)!r} there and {now.get(key)!r} now" for key in different)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; NaN and infinities, which JSON does not know, as null."""
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
        self.put(name, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def put(self, name: str, write: Callable[[Path], Any]) -> None:
        """Let `write` make a file under a temporary name; then it appears under its own.

        Raises:
            OSError: it could not be written; then nothing of it is left.
        """
        try:
            if not self.local:
                with tempfile.TemporaryDirectory() as scratch:
                    write(Path(scratch) / name)
                    self.fs.put_file(str(Path(scratch) / name), self.path(name))
                return
            with whole_file(Path(self.root) / name) as draft:
                write(draft)
                with draft.open("rb") as written:
                    os.fsync(written.fileno())
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{name} could not be written to {self.url}: {error}. With room and access, the same command "
                f"continues from there. Received: {len(self.shards())} shard(s) so far."
            ) from error

    def put_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        name = shard_name(number)
        if self.local:
            for leftover in Path(self.root).glob(f".{name}.*"):  # of a killed process; no other makes this shard
                leftover.unlink(missing_ok=True)
        self.put(name, lambda path: save_file(dict(tensors), path, metadata={"block": str(number)}))

    def size_of(self, name: str) -> tuple[int, int]:
        """Tokens and bytes of a shard, from its header.

        Raises:
            ValueError: the file is not what its header says.
        """
        path, size = self.path(name), self.fs.size(self.path(name))
        try:
            length = struct.unpack("<Q", self.fs.cat_file(path, 0, 8))[0]
            header = json.loads(self.fs.cat_file(path, 8, min(8 + length, size)))
            end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
            if 8 + length + end == size:
                return header["row"]["shape"][0], size
        except (struct.error, ValueError, KeyError):
            pass
        raise ValueError(
            f"{name} of {self.url} is broken ({size} bytes). Delete it and harvest again: only it is made."
        )


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes: of the process group, else as torchrun sets them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def harvest_to_store(
    model: Any,
    tokenizer: Any,
    source: TextSource,
    settings: HarvestSettings,
    url: str | Path,
    *,
    keep: KeepTokens | None = None,
    max_tokens: int | None = None,
    model_name: str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Harvested:
    """Harvest what is not in the store yet. Killed at any moment, the same call continues; with several processes,
    rank r of w does the blocks r, r + w, ... and nothing else is shared.

    Args:
        model: a base model, on its device.
        tokenizer: of the base.
        source: rows of text.
        settings: see `HarvestSettings`.
        url: a folder or any fsspec URL.
        keep: see `Harvester`.
        max_tokens: use the first rows of the source that have this many tokens to keep, rounded up to a whole block.
        model_name, revision: for the index; what the model was loaded from by default.
        progress: called with (rows done, rows) after each block, on rank 0; 0 where their number is not known.

    Raises:
        ValueError: the store has other settings, a shard in it is broken, no token is to be kept at all, or a hidden
            state is not finite in the stored dtype.
        OSError: a shard cannot be written. All others are there, and nothing of this one.
    """
    harvester, store = Harvester(model, tokenizer, source, settings, keep=keep), Store(url)
    if max_tokens is not None:
        source = source.first(harvester.rows_for_tokens(max_tokens))
        harvester.source = source
    name = model_name or model.config.name_or_path
    index = _index(harvester, name, revision or getattr(model.config, "_commit_hash", None))
    _open_index(store, index, begin=False)
    rank, world = rank_and_world()
    there, new_tokens, writing = set(store.shards()), 0, None
    absent = (number for number in itertools.count(rank, world) if shard_name(number) not in there)
    # A shard is copied from the device and written while the next one is made.
    with ThreadPoolExecutor(max_workers=1) as writer:
        for number, rows in source.blocks(settings.rows_per_shard, absent):
            block = harvester.tokens(number, rows)
            hidden = harvester.hidden(block)
            if progress is not None and rank == 0:
                progress(number * settings.rows_per_shard + len(rows.texts), source.n_rows or 0)
            new_tokens += len(block.row)
            wait = _start_copy(hidden)
            if writing is not None:
                writing.result()
            else:  # a run that fails before it has anything to write leaves a folder that takes other settings
                _open_index(store, index, begin=True)
            writing = writer.submit(_write, store, number, wait, block, bool(source.labels))
        if writing is not None:
            writing.result()
    return _finish(store, source, settings.rows_per_shard, new_tokens)


def _index(harvester: Harvester, name: str, revision: str | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "revision": revision,
        "places": harvester.reader.widths(),
        "dtype": harvester.settings.dtype,
        "labels": list(harvester.source.labels),
        "settings": harvester.identity(),
    }


def _open_index(store: Store, index: dict[str, Any], *, begin: bool) -> None:
    """Check that the index that is there is the same; write one, to `begin`, where there is none."""
    index = json.loads(json.dumps(index))  # tuples are lists there
    shards = store.shards()  # before the index, which another process may write just now, and its shards after it
    different = store.differences("index.json", index)
    if different is None:
        if shards:
            raise ValueError(
                f"A store has an index.json. Received: url={store.url!r} with {len(shards)} shards and none; harvest "
                f"to another folder."
            )
        if begin:
            store.write_json("index.json", index)
        return
    if different:
        raise ValueError(
            f"A harvest continues with the settings it began with. Received: url={store.url!r}, where {different}. "
            f"Use those settings or another folder."
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return flat


def _start_copy(hidden: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin the copy to the host; the result waits for it. On CUDA it runs beside the next block's passes."""
    devices = {tensor.device for tensor in hidden.values() if tensor.is_cuda}
    host, streams = dict(hidden), []
    for device in devices:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        streams.append(stream)
        with torch.cuda.stream(stream):
            for place, tensor in hidden.items():
                if tensor.device == device:
                    host[place] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                    host[place].copy_(tensor, non_blocking=True)
                    tensor.record_stream(stream)

    def wait() -> dict[str, Tensor]:
        for stream in streams:
            stream.synchronize()
        return {place: tensor.cpu() for place, tensor in host.items()}

    return wait


def _write(store: Store, number: int, wait: Callable[[], dict[str, Tensor]], block: Any, with_labels: bool) -> None:
    tensors = {**wait(), "token": block.token, "position": block.position, "row": block.row}
    if with_labels:
        tensors["labels"] = block.labels
    store.put_shard(number, tensors)


def _finish(store: Store, source: TextSource, rows_per_shard: int, new_tokens: int) -> Harvested:
    """Write complete.json if all shards are there, whichever process made the last."""
    names = store.shards()
    sizes = [store.size_of(name) for name in names]
    n_tokens, n_bytes = sum(n for n, _ in sizes), sum(b for _, b in sizes)
    n_rows = source.n_rows or 0  # known: every process has read up to the end
    complete = names == [shard_name(i) for i in range(-(-n_rows // rows_per_shard))]
    if complete:
        if not n_tokens:
            raise ValueError(f"No token is left of {n_rows} rows of text: they are empty, or nothing was to be kept.")
        store.write_json("complete.json", {"n_tokens": n_tokens, "shards": [n for n, _ in sizes]})
    return Harvested(n_tokens, len(names), n_bytes, complete, new_tokens)
