"""The files of one published SAE, read safely: in a folder, in a single file or in a Hub repository.

Nothing here executes what a file says. Safetensors and npz are tensors only; a pickle is read by torch's
tensor-only unpickler, and refused where it holds anything else. What a file claims about its size is checked against
its size before memory is taken. Tensors are mapped, not read: their pages come when they are used.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from ..repository_files import plain_errors

PICKLES = (".pt", ".pth", ".bin")
MAX_JSON_BYTES = 2**24


class Checkpoint:
    """The files of one SAE. A file of a Hub repository is fetched when it is first asked for.

    Args:
        name: a folder, a file or a Hub id.
        part: folder or file inside it; "" for all of it.
        hub: `revision`, `token`, `cache_dir`, ... for the Hub.
        given: fields of the SAE's config that the caller states, for what a format leaves out (`k`, `input_scale`).
    """

    def __init__(
        self, name: str, part: str = "", hub: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None
    ) -> None:
        self.hub = {key: value for key, value in (hub or {}).items() if key != "subfolder"}
        self.given = dict(given or {})
        part = str(PurePosixPath(part)) if part else ""
        if part.startswith("/") or ".." in PurePosixPath(part).parts:
            raise ValueError(f"An SAE is named by a path inside its repository. Received: {part!r}.")
        if Path(name).is_file() and not part:
            self.root, self.part = str(Path(name).parent), Path(name).name
        else:
            self.root, self.part = name, "" if part == "." else part

    @property
    def local(self) -> bool:
        return Path(self.root).exists()

    @property
    def label(self) -> str:
        """Repository and path in one, for messages and for formats that say in names what no file says."""
        return f"{self.root.rstrip('/')}/{self.part}" if self.part else self.root

    @cached_property
    def repository_files(self) -> list[str]:
        """All files of the folder or repository, sorted, with `/`."""
        if self.local:
            root = Path(self.root)
            return sorted(
                (Path(folder) / file).relative_to(root).as_posix()
                for folder, _, files in os.walk(root)
                for file in files
                if not file.endswith(".part")
            )
        options = {key: self.hub[key] for key in ("revision", "token") if key in self.hub}
        if not self.hub.get("local_files_only"):
            try:
                return sorted(HfApi(token=options.pop("token", None)).list_repo_files(self.root, **options))
            except Exception as error:  # offline, or no such repository: what is cached decides
                offline = error
        else:
            offline = None
        cached = {key: self.hub[key] for key in ("revision", "cache_dir") if key in self.hub}
        try:
            folder = snapshot_download(self.root, local_files_only=True, **cached)
        except Exception as error:
            raise OSError(
                f"Nothing to read at {self.root!r}: it is no folder, and the Hub's repository of that name could not "
                f"be listed ({offline or error})."
            ) from error
        return Checkpoint(folder).repository_files

    @cached_property
    def files(self) -> list[str]:
        """Files of this SAE, relative to its folder; the one file where a file was named."""
        if not self.part:
            return self.repository_files
        if self.part in self.repository_files:
            return [PurePosixPath(self.part).name]
        prefix = self.part + "/"
        return [file[len(prefix) :] for file in self.repository_files if file.startswith(prefix)]

    def within(self, part: str) -> Checkpoint:
        """The SAE at another path of the same repository."""
        other = Checkpoint(self.root, part, self.hub, self.given)
        other.__dict__["repository_files"] = self.repository_files
        return other

    @property
    def folder(self) -> str:
        """Path of its folder inside the repository, "" for the root."""
        if self.part in self.repository_files:
            parent = str(PurePosixPath(self.part).parent)
            return "" if parent == "." else parent
        return self.part

    def has(self, *names: str) -> bool:
        return all(name in self.files for name in names)

    def path(self, file: str) -> Path:
        """Where a file lies on this machine."""
        inside = f"{self.folder}/{file}" if self.folder else file
        if self.local:
            return Path(self.root) / inside
        found = cached_file(self.root, inside, **self.hub)
        return Path(str(found))

    # -- contents ----------------------------------------------------------------------------------------------------

    def json(self, file: str) -> dict[str, Any]:
        """An object of a JSON file."""
        path = self.path(file)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path} is no config: it has {path.stat().st_size:,} bytes.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}. Download it again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is damaged: it holds no JSON object. Download it again.")
        return values

    def tensors(self, file: str, prefix: str = "") -> dict[str, Tensor]:
        """All tensors of a file whose name starts with `prefix`, without it; mapped, not read."""
        path = self.path(file)
        if path.suffix == ".safetensors":
            with plain_errors(str(path)), safe_open(path, framework="pt") as stored:
                names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name[len(prefix) :]: stored.get_tensor(name) for name in names}
        if path.suffix == ".npz":
            return _read_npz(path)
        found = self.pickled(file)
        return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}

    def pickled(self, file: str) -> dict[str, Any]:
        """The dict of a torch file: tensors, numbers, texts, and lists and dicts of them."""
        return _read_pickle(self.path(file))

    def names(self, file: str) -> set[str]:
        """Names of the tensors of a file; cheap for safetensors and npz."""
        path = self.path(file)
        if path.suffix == ".safetensors":
            with plain_errors(str(path)), safe_open(path, framework="pt") as stored:
                return set(stored.keys())
        if path.suffix == ".npz":
            with _opened_zip(path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        return set(map(str, self.pickled(file)))


# -- safe readers ----------------------------------------------------------------------------------------------------


def _opened_zip(path: Path) -> zipfile.ZipFile:
    """A zip whose contents are not larger than itself."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}. Download it again.") from error
    # Weights hardly compress: what says that it becomes much more is damaged or hostile.
    size = sum(entry.file_size for entry in archive.infolist())
    if size > 4 * path.stat().st_size + 2**16:
        archive.close()
        raise ValueError(f"{path} is refused: it claims {size:,} bytes in a file of {path.stat().st_size:,}.")
    return archive


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with _opened_zip(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            try:
                with archive.open(entry) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, fortran, dtype = read(stream)
                    start = stream.tell()
                    count = math.prod(shape)
                    if dtype.hasobject or not 0 <= count * dtype.itemsize <= entry.file_size:
                        raise ValueError(f"{name} is no array of numbers of its size")
                    if entry.compress_type == zipfile.ZIP_STORED:
                        array = np.memmap(path, dtype, "c", _data_offset(path, entry) + start, (count,))
                    else:
                        array = np.frombuffer(bytearray(stream.read(count * dtype.itemsize)), dtype, count)
                array = array.reshape(shape, order="F" if fortran else "C")
                tensors[name] = torch.from_numpy(np.asarray(array))
            except (
                ValueError,
                TypeError,
                OSError,
                EOFError,
                zipfile.BadZipFile,
                NotImplementedError,
                SyntaxError,
            ) as error:
                raise ValueError(f"{name} in {path} cannot be read as an array of numbers: {error}.") from error
    return tensors


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: its local header has its own lengths of name and extra field."""
    with path.open("rb") as stream:
        stream.seek(entry.header_offset + 26)
        lengths = stream.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        is_zip = zipfile.is_zipfile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not is_zip:
        raise ValueError(
            f"{path} is damaged, or a torch file from before 2020 whose claims cannot be checked; load it yourself "
            f"with `torch.load(..., weights_only=True)` and save it again."
        )
    with _opened_zip(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError(f"{path} is refused: torch does not compress what it saves, and this is compressed.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n\n")[0].splitlines()
        line = next((text.strip() for text in reversed(str(error).splitlines()) if "GLOBAL" in text), reason[-1])
        raise ValueError(
            f"{path} is a pickle that holds more than tensors, numbers and texts, which could run code; it is refused "
            f"({line})."
        ) from error
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{path} is damaged or cut short: {error!r}. Download it again.") from error
    _check_pickled(found, path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {type(found).__name__}; expected a dict of tensors.")
    return dict(found)


def _check_pickled(value: Any, path: Path, depth: int = 0) -> None:
    """Plain values and ordinary tensors only, none larger than what was stored for it."""
    if depth > 16:
        raise ValueError(f"{path} is refused: its contents are nested too deeply.")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{path} is refused: it holds a tensor of layout {value.layout} on {value.device}.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path} is refused: it holds a tensor of shape {tuple(value.shape)} over fewer bytes.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_pickled(key, path, depth + 1)
            _check_pickled(item, path, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _check_pickled(item, path, depth + 1)
    elif value is not None and not isinstance(
        value, (str, bool, int, float, complex, bytes, torch.dtype, torch.device)
    ):
        raise ValueError(f"{path} is refused: it holds {type(value).__name__}, expected tensors, numbers and texts.")
