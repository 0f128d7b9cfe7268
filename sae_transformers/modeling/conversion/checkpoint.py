"""The files of one published SAE, read safely: in a folder, in a single file or in a Hub repository.

Nothing here executes what a file says. Safetensors and npz are tensors only; a pickle is read by torch's
tensor-only unpickler, and refused where it holds anything else. What a file claims about its size is checked against
its size before memory is taken; what is no plain file is not opened. Tensors are mapped, not read: their pages come
when they are used.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..plain_files import check_plain, opened_tensors, read_json, read_plain

PICKLES = (".pt", ".pth", ".bin")
YAML_BYTES = 65_536
MAX_DIRECTORY_BYTES = 2**20  # of a zip: about 100 bytes for each of its files, and ten times that in memory
MAX_PROGRAM_BYTES = 2**19  # of a pickle: about 200 bytes for each of its tensors; a mark of one byte takes 70
MAX_VALUES = 2**17  # of a pickle, shared ones counted as often as they are met


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
                if not file.endswith((".draft", ".lock", ".part"))
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
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} is damaged: it holds no JSON object. Download it again.")
        return values

    def yaml(self, file: str) -> dict[str, Any]:
        """The mapping of a small YAML file."""
        path = self.path(file)
        try:
            values = yaml.safe_load(read_plain(path, most=YAML_BYTES).decode("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: it is no YAML. Download it again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is damaged: it holds no YAML mapping. Download it again.")
        return values

    def tensors(self, file: str, prefix: str = "") -> dict[str, Tensor]:
        """All tensors of a file whose name starts with `prefix`, without it; mapped, not read."""
        path = self.path(file)
        if path.suffix == ".safetensors":
            with opened_tensors(path) as stored:
                names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name[len(prefix) :]: stored.get_tensor(name) for name in names}
        if path.suffix == ".npz":
            return _read_npz(path)
        found = self.pickled(file)
        return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}

    def pickled(self, file: str) -> dict[str, Any]:
        """The dict of a torch file: tensors, numbers, texts, and lists and dicts of them."""
        path = self.path(file)
        found = read_pickle(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds {type(found).__name__}; expected a dict of tensors.")
        return dict(dict.items(found))

    def names(self, file: str) -> set[str]:
        """Names of the tensors of a file; cheap for safetensors and npz."""
        path = self.path(file)
        if path.suffix == ".safetensors":
            with opened_tensors(path) as stored:
                return set(stored.keys())
        if path.suffix == ".npz":
            with _opened_zip(path) as archive:
                return {name.removesuffix(".npy") for name in archive.namelist()}
        return set(map(str, self.pickled(file)))


# -- safe readers ----------------------------------------------------------------------------------------------------


class _ZipFile(io.FileIO):
    """A zip's file: while it is `opening`, nothing longer than any directory is read."""

    opening = True

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        wanted = rest if size is None or size < 0 else min(size, rest)
        if self.opening and wanted > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its directory would have {wanted:,} bytes, of at most {MAX_DIRECTORY_BYTES:,}")
        return super().read(wanted)


@contextlib.contextmanager
def _opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip whose contents are not larger than itself."""
    with _ZipFile(check_plain(path)) as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # whatever a damaged directory raises
            raise ValueError(f"{path} is damaged or cut short: {error!r}. Download it again.") from error
        file.opening = False
        with archive:
            # Weights hardly compress: what says that it becomes much more is damaged or hostile.
            size = sum(entry.file_size for entry in archive.infolist())
            if size > 4 * path.stat().st_size + 2**16:
                raise ValueError(f"{path} is refused: it claims {size:,} bytes in a file of {path.stat().st_size:,}.")
            yield archive


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
            except Exception as error:  # whatever numpy and its tokenizer make of a damaged header
                raise ValueError(f"{name} in {path} cannot be read as an array of numbers: {error}.") from error
    return tensors


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: its local header has its own lengths of name and extra field."""
    with path.open("rb") as stream:
        stream.seek(entry.header_offset + 26)
        lengths = stream.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def read_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds: tensors, numbers, texts, and lists and dicts of them.

    Raises:
        ValueError: it is damaged, or holds anything else.
        OSError: it is not there.
    """
    try:
        is_zip = zipfile.is_zipfile(check_plain(path))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not is_zip:
        raise ValueError(
            f"{path} is damaged, or a torch file from before 2020 whose claims cannot be checked; load it yourself "
            f"with `torch.load(..., weights_only=True)` and save it again."
        )
    with _opened_zip(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError(f"{path} is refused: torch does not compress what it saves, and this is compressed.")
        program = max((e.file_size for e in archive.infolist() if e.filename.endswith(".pkl")), default=0)
        if program > MAX_PROGRAM_BYTES:
            raise ValueError(
                f"{path} is refused: its pickle has {program:,} bytes without its tensors, of at most "
                f"{MAX_PROGRAM_BYTES:,}."
            )
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
    return found


def _check_pickled(value: Any, path: Path, depth: int = 0, seen: int = 0) -> int:
    """Plain values and ordinary tensors only, none larger than what was stored for it; gives how many were seen."""
    seen += 1
    if depth > 16 or seen > MAX_VALUES:
        raise ValueError(f"{path} is refused: its contents are nested too deeply, or more than {MAX_VALUES:,} values.")
    kind = type(value)
    # What a pickle hangs on an object can hide the methods of its class; torch itself notes the modules' versions.
    attributes = set(getattr(value, "__dict__", ())) - ({"_metadata"} if kind is OrderedDict else set())
    if attributes:
        names = ", ".join(sorted(map(str, attributes)))
        raise ValueError(f"{path} is refused: it holds a {kind.__name__} with attributes of its own ({names}).")
    if kind is Tensor or kind is nn.Parameter:
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ValueError(f"{path} is refused: it holds a tensor of layout {value.layout} on {value.device}.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path} is refused: it holds a tensor of shape {tuple(value.shape)} over fewer bytes.")
    elif kind in (dict, OrderedDict):
        for pair in dict.items(value):
            for item in pair:
                seen = _check_pickled(item, path, depth + 1, seen)
    elif kind in (list, tuple, set, torch.Size):
        for item in value:
            seen = _check_pickled(item, path, depth + 1, seen)
    elif value is not None and kind not in (str, bool, int, float, complex, bytes, torch.dtype, torch.device):
        raise ValueError(f"{path} is refused: it holds {kind.__name__}, expected tensors, numbers and texts.")
    return seen
