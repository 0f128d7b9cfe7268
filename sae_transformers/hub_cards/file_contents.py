"""What a file holds that must not be published: secrets, pickles, absolute paths. By name and by its bytes."""

from __future__ import annotations

import ast
import gzip
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from .markdown import PATH

# Kind of secret -> its form. A form is long enough that words and vocabularies do not have it by accident.
SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"(?<![A-Za-z0-9_-])sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}",
    "an AWS access key": rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a Google API key": rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "a Slack token": rb"(?<![A-Za-z0-9])xox[abposr]-[A-Za-z0-9-]{20,}",
    "a Weights & Biases key": rb"(?:wandb|WANDB)(?i:[_-]?api[_-]?key\W{1,5}[0-9a-f]{40})",
    "a login in an address": rb"(?i:\b[a-z][a-z0-9+.-]{1,20}://)[^\s/?#:@\"'<>]{1,100}:[^\s/?#@\"'<>]{1,200}@[A-Za-z0-9\[]",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
_SECRETS = {kind: re.compile(form) for kind, form in SECRETS.items()}
# What each form has in it, looked for first: a tenth of the time in large files.
_HINTS = {
    "a Hugging Face token": (b"hf_", b"api_org_"),
    "an OpenAI or Anthropic key": (b"sk-",),
    "an AWS access key": (b"AKIA", b"ASIA"),
    "a GitHub token": (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
    "a Google API key": (b"AIza",),
    "a Slack token": (b"xox",),
    "a Weights & Biases key": (b"wandb", b"WANDB"),
    "a login in an address": (b"://",),
    "a private key": (b"PRIVATE KEY",),
}
SECRET_NAMES = (".env", ".env.*", "*.pem", "id_rsa*", "id_ed25519*", ".netrc", "_netrc", ".git-credentials", ".pypirc",
                ".npmrc", "credentials", "credentials.json", "token", "stored_tokens")  # fmt: skip
PICKLE_NAMES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill", "*.cloudpickle",
                "*.pt2", "*.mar", "*.nemo")  # fmt: skip
# Files whose texts are words of a language: a path in them is a word.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model")
WITH_PATHS = ("*.json", "*.md", "*.yaml", "*.yml", "*.toml", "*.cfg", "*.ini")
# Folders that a machine has and a text does not mention by accident.
ROOTS = ("root", "home", "Users", "mnt", "tmp", "var", "data", "opt", "scratch", "work", "workspace", "private", "srv",
         "media", "gpfs", "lustre", "nfs", "content", "kaggle", "dbfs", "Volumes")  # fmt: skip
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}
BLOCK, OVERLAP = 1 << 22, 4096


class Found(NamedTuple):
    """What is wrong with a file: what it is, and where in it, if that is known."""

    what: str
    where: str = ""


def secrets(path: Path) -> Iterator[Found]:
    """Secrets in a file. The message never holds the secret."""
    if any(fnmatch(path.name, name) for name in SECRET_NAMES):
        yield Found("a file that usually holds a secret")
    seen, line = set(), 1
    for block, new in _blocks(path):
        for kind, form in _SECRETS.items():
            hinted = kind not in seen and any(hint in block for hint in _HINTS[kind])
            if hinted and (match := form.search(block)):
                seen.add(kind)
                yield Found(kind, f"line {line + block.count(10, 0, match.start())}")
        line += block.count(10, 0, new)


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """A file's bytes in overlapping blocks, each with the number of bytes that the next block does not repeat.

    Of safetensors the header alone: the rest is numbers.
    """
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            yield (header := _header(path)), len(header)
            return
        kept = b""
        while part := file.read(BLOCK):
            block = kept + part
            new = max(0, len(block) - OVERLAP) if len(part) == BLOCK else len(block)
            yield block, new
            kept = block[new:]


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.read(8)
        return file.read(min(struct.unpack("<Q", size)[0], 1 << 27)) if len(size) == 8 else b""


def pickle_in(path: Path) -> Found | None:
    """A pickle: by the file's name, by its first bytes, inside a zip, or as objects of a NumPy file."""
    if any(fnmatch(path.name.lower(), name) for name in PICKLE_NAMES):
        return Found("a pickle by its name")
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start.startswith(b"PK\x03\x04"):
        return _in_zip(path)
    if start.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path) as file:
                start = file.read(1 << 16)
        except (OSError, EOFError):
            return None
    return _by_bytes(start)


def _by_bytes(start: bytes) -> Found | None:
    if start[:1] == b"\x80" and len(start) > 2 and start[1] in range(2, 6):
        return Found("a pickle by its first bytes")
    if start.startswith(b"\x93NUMPY"):
        return Found("a NumPy file of objects, which is a pickle") if _has_objects(start) else None
    if start[:1] in (b"c", b"(", b"i", b"]", b"}"):  # protocols 0 and 1 are text, and have no mark
        return Found("a pickle by its first bytes") if _is_old_pickle(start) else None
    return None


def _has_objects(start: bytes) -> bool:
    text = re.search(rb"\{.*?\}", start[:4096], re.DOTALL)
    try:
        return bool(text) and "O" in str(ast.literal_eval(text[0].decode("latin-1")).get("descr", ""))
    except (ValueError, SyntaxError, AttributeError):
        return False


def _is_old_pickle(start: bytes) -> bool:
    called = False
    try:
        for opcode, _, _ in pickletools.genops(start):
            called = called or opcode.name in _CALLS
            if opcode.name == "STOP":
                return called
    except Exception:  # whatever is wrong, it is no pickle
        return False
    return False


def _in_zip(path: Path) -> Found | None:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    start = member.read(1 << 16)
                if fnmatch(name.lower(), "*.pkl") or _by_bytes(start):
                    return Found("a zip file with a pickle in it")
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError):
        return Found("a zip file that cannot be read")
    return None


def absolute_paths(path: Path) -> Iterator[Found]:
    """Absolute paths in JSON, YAML and Markdown, and in the metadata of safetensors; the first three of a file."""
    if path.suffix == ".safetensors":
        try:
            texts = [("metadata", json.dumps(json.loads(_header(path) or b"{}").get("__metadata__", {})))]
        except ValueError:
            return
    elif not any(fnmatch(path.name, name) for name in WITH_PATHS) or any(
        fnmatch(path.name, name) for name in VOCABULARIES
    ):
        return
    elif path.suffix == ".json":
        texts = list(_strings(path))
    else:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts = [(f"line {number}", line) for number, line in enumerate(lines, 1)]
    found = [(where, path_) for where, text in texts for path_ in _paths(text)]
    for where, shown in found[:3]:
        yield Found(f"the absolute path {shown!r}", where)


def _paths(text: str) -> list[str]:
    return [found[0] for found in PATH.finditer(text) if _of_a_machine(found[0])]


def _of_a_machine(path: str) -> bool:
    parts = re.split(r"[/\\]", path)
    return "\\" in path or parts[1] in ROOTS or Path(path).exists()


def _strings(path: Path) -> Iterator[tuple[str, str]]:
    """Every text of a JSON file with the way to it; of a broken one its lines."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        yield from ((f"line {number}", line) for number, line in enumerate(text.splitlines(), 1))
        return
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, str):
            yield where.lstrip("."), value
        elif isinstance(value, dict):
            stack.extend((f"{where}.{key}", one) for key, one in reversed(value.items()))
            yield from ((f"{where}.{key}".lstrip("."), key) for key in value)
        elif isinstance(value, list):
            stack.extend((f"{where}[{i}]", one) for i, one in reversed(list(enumerate(value))))
