"""Whether a folder can be published as it is: every reason against it, found before anything is sent."""

from __future__ import annotations

import ast
import json
import re
import struct
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCard, ModelCard, SpaceCard, constants

from .facts import HEADS, REPO_ID, read_json
from .file_contents import CLOSED, PICKLE, SECRET, Found, absolute_paths, faults

# Left out without a word: of tools, not of a model. A .gitignore would make the Hub drop files in silence.
SILENT = (".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store", "*.pyc", ".gitattributes", ".gitignore")
# State of a run; `work/part-*` is that of `spans`.
NOT_BELONGING = (
    "checkpoint-*", "*.draft", "*.part", "*.tmp", "*.lock", "*.incomplete", "optimizer.*", "scheduler.*", "scaler.*",
    "rng_state*", "trainer_state.json", "training_args.*", "sae_training_state.safetensors", "events.out.tfevents*",
    "wandb", "runs", ".README.md.*", ".*.safetensors.*", ".*.json.*",
)  # fmt: skip
IMPORTS = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
# What to do, told once for all files that it concerns.
REMEDIES = {
    SECRET: "Take secrets out and revoke them: one that was in a file counts as known.",
    PICKLE: "A pickle can run code where it is loaded: save tensors as safetensors, or leave it out by `exclude`.",
    CLOSED: "What is not opened is not checked: unpack it, or leave it out by `exclude`.",
}
PATHS = (
    "Absolute paths say nothing elsewhere and tell about your machine: for a base's folder give `base`, its id on "
    "the Hub; else change the file, leave it out by `exclude`, or keep it by `allow_paths`."
)
STATE = "The state of a run is no part of what is published: leave it out by `exclude`."
SAVE = "Save the model again by `save_pretrained`."
BASE = "Give `base`, the base's id on the Hub; publish the base first if it has none."
CARD = "Write it by `sae-transformers card`."


class Problem(NamedTuple):
    """A reason against publishing: what is wrong, and what to do."""

    what: str
    how: str


def files_of(folder: Path, exclude: tuple[str, ...] = ()) -> dict[str, Path]:
    """Path in the repository -> file, in order, without what tools left and what is excluded.

    Args:
        folder: a folder.
        exclude: patterns of a path in the repository, of its name, or of a folder in it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds nothing; or a link that leads nowhere, to a folder, or out of this one and not into the
            Hub's cache.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder to publish. Received: {str(folder)!r}, which is none.")
    whole = folder.resolve()
    insides = [whole, Path(constants.HF_HUB_CACHE).resolve()]
    if whole.parent.name == "snapshots":  # of a cache elsewhere
        insides.append(whole.parents[1] / "blobs")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _matches(name, SILENT) or _matches(name, exclude) or (path.is_dir() and not path.is_symlink()):
            continue
        if not path.is_file():
            raise ValueError(f"{path} must be a file. Received: a link to a folder or to nothing; put a copy there.")
        if not any(path.resolve().is_relative_to(inside) for inside in insides):
            raise ValueError(
                f"{path} must be a file of the folder. Received: a link to {path.resolve()}; put a copy there, or "
                f"leave it out by `exclude`."
            )
        found[name] = path
    if not found:
        raise ValueError(f"There is nothing to publish in {str(folder)!r}.")
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    parts = name.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch(one, pattern.rstrip("/")) for pattern in patterns for one in (*parts, *heads))


def problems(files: Mapping[str, Path], *, allow_paths: bool = False) -> list[Problem]:
    """Reasons against publishing these files, whatever they are."""
    found = []
    for name, path in files.items():
        if _matches(name, NOT_BELONGING):
            found.append(Problem(f"{name}: of a run", STATE))
            continue
        found += [Problem(f"{name}: {_told(one)}", REMEDIES[one.fault]) for one in faults(path)]
        if not allow_paths:
            found += [Problem(f"{name}: {_told(one)}", PATHS) for one in absolute_paths(path)]
        if path.suffix == ".safetensors" and (reason := _broken(path)):
            found.append(Problem(f"{name}: {reason}", SAVE))
    return found


def _told(one: Found) -> str:
    return f"{one.what} ({one.where})" if one.where else one.what


def _broken(path: Path) -> str:
    """Why a safetensors file is no whole one; empty if it is."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, size)))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return "no safetensors file"
    return "" if 8 + length + end == size else f"cut short: {size:,} bytes, and its header says {8 + length + end:,}"


def card_problems(files: Mapping[str, Path], kind: str) -> list[Problem]:
    """Reasons why README.md is no card that the Hub reads."""
    if "README.md" not in files:
        return [Problem("README.md: missing", CARD)]
    reader = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}[kind]
    try:
        text = files["README.md"].read_text(encoding="utf-8")
        if not text.lstrip().startswith("---"):
            return [Problem("README.md: no metadata at its top", CARD)]
        reader(text)
    except Exception as error:  # YAML's and the client's own errors have no common class
        return [Problem(f"README.md: its metadata cannot be read ({' '.join(str(error).split())[:200]})", CARD)]
    return []


def model_problems(files: Mapping[str, Path], folder: Path) -> list[Problem]:
    """Reasons why a model would not load from these files: config, base, code, weights.

    Args:
        files: of `files_of`.
        folder: from which they are.
    """
    if "config.json" not in files:
        return [Problem("config.json: missing", "Give a model's folder, or say by `kind` what it is.")]
    try:
        config = read_json(files["config.json"])
    except (ValueError, UnicodeDecodeError) as error:
        return [Problem(f"config.json: {error}", SAVE)]
    if not isinstance(config, dict):
        return [Problem("config.json: no object", SAVE)]
    found = [*_weight_problems(files)]
    if "auto_map" not in config and {"d_in", "d_sae"} <= set(config):
        return found  # an SAE alone: no code, no base
    found += _base_problems(config, folder)
    found += _code_problems(config, files)
    return found


def _base_problems(config: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    if config.get("weights_scope") == "full":
        return
    base = config.get("base_model_name_or_path")
    if not base:
        yield Problem("config.json: names no base, which an SAE-sized repository needs", BASE)
        return
    text = str(base)
    if not REPO_ID.fullmatch(text) or Path(text).is_dir() or (folder / text).is_dir():
        yield Problem(f"config.json: its base is a folder of this machine, {text!r}", BASE)


def _code_problems(config: Mapping[str, Any], files: Mapping[str, Path]) -> Iterator[Problem]:
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        yield Problem("config.json: no auto_map, so that nobody could load it", SAVE)
        return
    if not any(name in HEADS for name in config.get("architectures") or ()):
        yield Problem("config.json: `architectures` names none of our classes", SAVE)
    wanted: dict[str, set[str]] = {}
    for target in auto_map.values():
        for one in target if isinstance(target, list) else [target]:
            if one and "--" not in str(one):  # else the code of another repository
                module, _, name = str(one).rpartition(".")
                wanted.setdefault(module, set()).add(name)
    queue, seen = list(wanted), set()
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        if f"{module}.py" not in files:
            yield Problem(f"{module}.py: missing, though auto_map or another file needs it", SAVE)
            continue
        source = files[f"{module}.py"].read_text(encoding="utf-8", errors="replace")
        try:
            classes = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        except SyntaxError as error:
            yield Problem(f"{module}.py: no Python ({error.msg}, line {error.lineno})", SAVE)
            continue
        for name in sorted(wanted.get(module, set()) - classes):
            yield Problem(f"{module}.py: has no class {name}, which auto_map names", SAVE)
        queue += IMPORTS.findall(source)


def _weight_problems(files: Mapping[str, Path]) -> Iterator[Problem]:
    if "model.safetensors" in files:
        return
    if "model.safetensors.index.json" not in files:
        yield Problem("model.safetensors: missing", SAVE)
        return
    try:
        shards = sorted(set(read_json(files["model.safetensors.index.json"])["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Problem(f"model.safetensors.index.json: broken ({error!r})", SAVE)
        return
    for shard in shards:
        if shard not in files:
            yield Problem(f"{shard}: missing, though the index names it", SAVE)
