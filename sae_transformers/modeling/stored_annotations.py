"""What is known of an SAE's features in words, in a file beside its weights; read when it is first asked for.

The file is a Parquet table that the library reads: this folder, published as it is, only carries it along. Where the
library is not installed, a model works by the names in its config, and its annotations stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from .output_files import whole_file

READER = "sae_transformers.latents.annotations.table"
HUB = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "force_download")


def annotations_file(number: int = 0) -> str:
    """The file of SAE `number` of a model; an SAE by itself is number 0."""
    return f"annotations-{number}.parquet" if number else "annotations.parquet"


class StoredAnnotations:
    """The annotations of one SAE: given from Python, or in the file of a folder or repository.

    Args:
        name: a folder or Hub id; None: nothing is stored.
        hub: options of the Hub.
        number: of the SAE in it.
    """

    def __init__(self, name: str | None = None, hub: Mapping[str, Any] | None = None, number: int = 0) -> None:
        self.point(name, hub, number)

    def point(self, name: str | None, hub: Mapping[str, Any] | None = None, number: int = 0) -> None:
        """Say where they are; what was read or given before is forgotten."""
        self._name, self._number = name, number
        self._hub = {key: value for key, value in (hub or {}).items() if key in HUB and value is not None}
        self._value: Any = None
        self._read = name is None

    def set(self, value: Any) -> None:
        """Take annotations, or None for none, in place of those that are stored."""
        self.point(None)
        self._value = value

    def get(self) -> Any:
        """The annotations, a `FeatureAnnotations`; None where there are none, or no library that reads them.

        Raises:
            ValueError: their file is damaged.
        """
        if not self._read:
            path = self.path()
            if path is not None:
                try:
                    reader = importlib.import_module(READER)
                except ModuleNotFoundError as error:  # code that came with a repository, without the library
                    if not (error.name or "").startswith("sae_transformers"):
                        raise
                    return None
                self._value = reader.FeatureAnnotations.load(path)
            self._read = True
        return self._value

    def path(self) -> Path | None:
        """The file, fetched where needed; None where there is none."""
        if self._name is None:
            return None
        if Path(self._name).is_dir():
            found = Path(self._name, self._hub.get("subfolder") or "", annotations_file(self._number))
            return found if found.is_file() else None
        with contextlib.suppress(OSError):  # no such repository any more, or no network: none that is at hand
            quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            path = cached_file(self._name, annotations_file(self._number), **self._hub, **quiet)
            return None if path is None else Path(path)
        return None

    def save(self, folder: str | Path, number: int = 0) -> None:
        """Write them beside the weights in `folder`; a file that is there and of none of ours goes.

        What was not read is copied as it is.
        """
        target = Path(folder) / annotations_file(number)
        if self._value is not None:
            self._value.save(target)
            return
        source = None if self._read else self.path()
        if source is None:
            target.unlink(missing_ok=True)
        elif not target.exists() or not source.samefile(target):
            with whole_file(target) as draft:
                shutil.copyfile(source, draft)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)  # where they are is no part of what a model's config says

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def summary(self) -> str:
        """For `print`: how many features are described, or that a file says; nothing is fetched or read for it."""
        if self._value is not None:
            return f"{len(self._value.described):,} described"
        if not self._read and self._name and Path(self._name).is_dir() and self.path() is not None:
            return "descriptions beside it"
        return ""


def keep_names(config: Any) -> None:
    """Give the SAEs' configs the names that the default steering uses and only their annotations know, so that it
    works where those cannot be read. A feature that has a name already is named by its number there."""
    entries, waiting = config.sae_configs, [config.steering]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (list, tuple)):
            waiting += part
        elif isinstance(part, Mapping):
            waiting += part.values()
            name, number = part.get("feature"), part.get("sae", 0)
            if not isinstance(name, str) or number not in range(len(entries)):
                continue
            entry = entries[number]
            if name in entry.concepts or name in entry.feature_names.values():
                continue
            feature = str(entry.resolve_feature(name))
            if feature in entry.feature_names:
                part["feature"] = int(feature)  # pyright: ignore[reportIndexIssue]
            else:
                entry.feature_names[feature] = name
                config.saes[number].setdefault("feature_names", {})[feature] = name
